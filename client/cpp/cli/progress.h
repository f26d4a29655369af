// Progress display on stderr.
#ifndef CERTIQ_CLIENT_CPP_CLI_PROGRESS_H_
#define CERTIQ_CLIENT_CPP_CLI_PROGRESS_H_

#include <cstdint>
#include <ostream>
#include <string>

#include "absl/time/time.h"
#include "certiq/client.h"

namespace certiq::cli {

// A bar that redraws itself on a terminal; a line for each new phase anywhere else. Show() is
// called for one event at a time, as certiq::Client does. Destroying it wipes the bar.
class ProgressPrinter {
 public:
  // `err` must outlive this object.
  ProgressPrinter(std::ostream* err, bool terminal) : err_(*err), terminal_(terminal) {}
  ProgressPrinter(const ProgressPrinter&) = delete;
  ProgressPrinter& operator=(const ProgressPrinter&) = delete;
  ~ProgressPrinter() { Wipe(); }

  void Show(const ProgressEvent& event);

 private:
  void ShowPhase(v1::Phase phase, double fraction, const std::string& note);
  void ShowRetry(const RetryNotice& notice);
  void Wipe();

  std::ostream& err_;
  const bool terminal_;
  bool bar_drawn_ = false;
  v1::Phase phase_ = v1::PHASE_UNSPECIFIED;
  absl::Time drawn_ = absl::InfinitePast();
};

// "3.2 MiB".
std::string BytesText(int64_t bytes);

}  // namespace certiq::cli

#endif  // CERTIQ_CLIENT_CPP_CLI_PROGRESS_H_
