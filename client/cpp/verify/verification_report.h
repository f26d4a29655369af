// Verification report: a finding for each number of a certificate.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_VERIFICATION_REPORT_H_
#define CERTIQ_CLIENT_CPP_VERIFY_VERIFICATION_REPORT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace certiq::verify {

enum class Verdict { kHolds, kWrong, kNotChecked };

// One line of the result.
struct Finding {
  Verdict verdict = Verdict::kNotChecked;
  // The field of the certificate, or what was claimed.
  std::string name;
  std::string text;
};

// A closed interval of acceptable values.
struct Range {
  double low = 0;
  double high = 0;
};

// value within `relative` of itself and `absolute`.
Range Around(double value, double relative, double absolute = 0);

// Collects findings in order. Not thread-safe.
class VerificationReport {
 public:
  // `certified` lies in `range`; NaN never does. `recomputed` is what to show.
  void Number(absl::string_view name, double certified, double recomputed, Range range);
  // |certified - recomputed| <= relative |recomputed|.
  void Close(absl::string_view name, double certified, double recomputed, double relative);
  // A field that is present where `expected` is, and then close to it.
  void OptionalClose(absl::string_view name, bool present, double certified,
                     std::optional<double> expected, double relative);
  // One entry a row; the line shows the row that is off the most.
  void Rows(absl::string_view name, const std::vector<double>& certified,
            const std::vector<double>& recomputed, const std::vector<Range>& ranges);
  // low <= certified <= high.
  void Count(absl::string_view name, int64_t certified, int64_t low, int64_t high);
  void Same(absl::string_view name, absl::string_view certified, absl::string_view recomputed);
  // A statement that is true or not.
  void Claim(absl::string_view name, bool holds, absl::string_view text);
  void NotChecked(absl::string_view name, absl::string_view reason);

  const std::vector<Finding>& findings() const { return findings_; }
  int64_t count(Verdict verdict) const;

 private:
  std::vector<Finding> findings_;
};

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_VERIFICATION_REPORT_H_
