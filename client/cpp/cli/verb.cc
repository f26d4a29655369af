#include "verb.h"

#include <ostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "base/status_macros.h"
#include "errors.h"
#include "files.h"

namespace certiq::cli {

CallOptions CallOptionsFor(const Io& io, ProgressPrinter* progress) {
  CallOptions options;
  options.cancel = io.interrupt;
  if (progress != nullptr) {
    options.progress = [progress](const ProgressEvent& event) { progress->Show(event); };
  }
  return options;
}

int Fail(const absl::Status& status, const ConnectionFlags& flags, const Io& io,
         absl::string_view advice) {
  if (io.interrupt.stop_requested()) {
    io.err << "certiq: interrupted\n";
    return kExitInterrupted;
  }
  PrintError(status, advice.empty() ? GeneralAdvice(status, flags.server) : std::string(advice),
             io.err);
  return kExitFailed;
}

int ExitCode(const absl::StatusOr<int>& code, const ConnectionFlags& flags, const Io& io) {
  return code.ok() ? *code : Fail(code.status(), flags, io);
}

absl::StatusOr<v1::Calibration> FindFinalized(const ConnectionFlags& flags, const Io& io,
                                              const std::string& id_or_label) {
  ASSIGN_OR_RETURN(const auto client, ConnectTo<CalibrationClient>(flags, io));
  absl::StatusOr<v1::Calibration> found = client->Find(id_or_label, CallOptionsFor(io, nullptr));
  if (!found.ok() || found->state() == v1::CALIBRATION_STATE_FINALIZED) return found;
  return absl::FailedPreconditionError(
      absl::StrCat("calibration ", found->id(), " is still open; `certiq calibrations finalize ",
                   found->id(), "` ends its filling"));
}

int PrintJson(const google::protobuf::Message& message, const Io& io) {
  const absl::StatusOr<std::string> text = JsonText(message);
  if (!text.ok()) {
    PrintError(text.status(), "", io.err);
    return kExitFailed;
  }
  io.out << *text;
  return kExitOk;
}

std::string EnumText(const std::string& name, absl::string_view prefix) {
  // The server may be newer than this program.
  return name.empty() ? "UNKNOWN" : std::string(absl::StripPrefix(name, prefix));
}

std::string TimeText(const google::protobuf::Timestamp& time) {
  if (time.seconds() == 0) return "-";
  return absl::FormatTime("%Y-%m-%d %H:%M:%SZ", absl::FromUnixSeconds(time.seconds()),
                          absl::UTCTimeZone());
}

void PrintLine(absl::string_view label, const std::string& value, std::ostream& out) {
  out << absl::StrFormat("%-16s%s\n", label, Printable(value));
}

}  // namespace certiq::cli
