#include "summary.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "errors.h"

namespace certiq::cli {
namespace {

void Line(std::string* text, const char* label, const std::string& value) {
  absl::StrAppendFormat(text, "%-16s%s\n", label, value);
}

std::string MethodText(const v1::Certificate& certificate) {
  std::string name(absl::StripPrefix(v1::Method_Name(certificate.method()), "METHOD_"));
  if (certificate.method() == v1::METHOD_QRONOS) name = "Qronos";
  if (certificate.method() == v1::METHOD_NEAREST) name = "plain rounding";
  return absl::StrFormat("%s, %d bits %s, %s", name, certificate.bits(),
                         certificate.symmetric() ? "symmetric" : "asymmetric",
                         certificate.group_size() == 0
                             ? std::string("one scale a row")
                             : absl::StrFormat("groups of %d features", certificate.group_size()));
}

std::string StorageText(v1::DataType dtype, double bits) {
  std::string text = absl::StrFormat("%.2f bits a weight", bits);
  if (bits > 0 && DataTypeBytes(dtype) > 0) {
    absl::StrAppendFormat(&text, ", %.2f times smaller than %s",
                          8 * static_cast<double>(DataTypeBytes(dtype)) / bits,
                          DataTypeName(dtype));
  }
  return text;
}

std::string ReadersOf(const v1::Certificate& certificate) {
  std::string text;
  for (const v1::Reader& reader : certificate.loads_in()) {
    absl::StrAppend(&text, text.empty() ? "" : "; ", Printable(reader.name()), " ",
                    Printable(reader.versions()));
  }
  return text;
}

std::string SecondsText(double seconds) {
  if (seconds < 0.9995) return absl::StrFormat("%.0f ms", 1000 * seconds);
  return absl::StrFormat("%.2f s", seconds);
}

std::string TimeText(const v1::PhaseSeconds& seconds) {
  struct Phase {
    const char* name;
    double seconds;
  };
  const Phase phases[] = {{"receive", seconds.receive()}, {"queue", seconds.queue()},
                          {"factor", seconds.factor()},   {"round", seconds.round()},
                          {"certify", seconds.certify()}, {"reference", seconds.reference()},
                          {"pack", seconds.pack()}};
  std::string text;
  double total = 0;
  for (const Phase& phase : phases) {
    total += phase.seconds;
    absl::StrAppend(&text, text.empty() ? "" : ", ", phase.name, " ", SecondsText(phase.seconds));
  }
  return absl::StrCat(SecondsText(total), " (", text, ")");
}

void AppendErrors(const v1::Certificate& certificate, std::string* text) {
  Line(text, "error", absl::StrFormat("%.5f relative", certificate.relative_error()));
  if (certificate.has_nearest_relative_error()) {
    std::string value = absl::StrFormat("%.5f relative", certificate.nearest_relative_error());
    if (certificate.relative_error() > 0) {
      absl::StrAppendFormat(&value, "; this result is %.2f times smaller",
                            certificate.nearest_relative_error() / certificate.relative_error());
    }
    Line(text, "plain rounding", value);
  }
  if (certificate.has_held_out_relative_error()) {
    Line(text, "unseen tokens",
         absl::StrFormat("%.5f relative on %d held-out tokens, %d rows of W",
                         certificate.held_out_relative_error(), certificate.held_out_tokens(),
                         certificate.held_out_rows()));
  }
  std::string bound = "proven";
  if (certificate.reference_energy() > 0) {
    bound = absl::StrFormat("%.5f relative, proven",
                            certificate.l2_bound() / std::sqrt(certificate.reference_energy()));
  }
  if (certificate.l2_bound() > 0) {
    absl::StrAppendFormat(&bound, "; the damped error is %.2f of it",
                          std::sqrt(certificate.damped_squared_error()) / certificate.l2_bound());
  }
  Line(text, "bound", bound);
  if (certificate.row_bound_size() > 0) {
    Line(text, "rows",
         absl::StrFormat("%d of %d within their bound", RowsWithinBound(certificate),
                         certificate.row_bound_size()));
  }
}

}  // namespace

int64_t RowsWithinBound(const v1::Certificate& certificate) {
  const int rows = std::min(certificate.row_error_size(), certificate.row_bound_size());
  int64_t within = 0;
  for (int row = 0; row < rows; ++row) {
    // The two numbers come from different sums, whose last digits may differ.
    if (certificate.row_error(row) <= certificate.row_bound(row) * (1 + 1e-9)) ++within;
  }
  return within;
}

std::string SummaryText(const std::string& layer, v1::DataType weight_dtype,
                        const v1::Certificate& certificate) {
  const int64_t rows = certificate.rows();
  const int64_t features = certificate.features();
  const std::string dtype = weight_dtype == v1::DATA_TYPE_UNSPECIFIED
                                ? ""
                                : absl::StrCat(" ", DataTypeName(weight_dtype));
  std::string text;
  Line(&text, "layer", absl::StrFormat("%s [%d, %d]%s", Printable(layer), rows, features, dtype));
  Line(&text, "method", MethodText(certificate));
  if (certificate.outcome() == v1::OUTCOME_FELL_BACK_TO_NEAREST) {
    Line(&text, "outcome", "FELL BACK TO PLAIN ROUNDING: every damping attempt failed");
  }
  if (certificate.loads_in_size() > 0) Line(&text, "loads in", ReadersOf(certificate));
  Line(&text, "storage", StorageText(weight_dtype, certificate.bits_per_weight()));
  AppendErrors(certificate, &text);
  const int attempts = certificate.damping_attempts_size();
  Line(&text, "damping",
       absl::StrFormat("lambda %.4g used (%.4g asked), %d %s", certificate.lambda_used(),
                       certificate.lambda_requested(), attempts,
                       attempts == 1 ? "attempt" : "attempts"));
  if (certificate.condition_estimate() > 0) {
    Line(&text, "condition", absl::StrFormat("%.2g estimated", certificate.condition_estimate()));
  }
  const double weights = static_cast<double>(rows) * static_cast<double>(features);
  Line(&text, "clipped",
       absl::StrFormat(
           "%d weights (%.3g %%) in %d of %d rows", certificate.clipped_weights(),
           weights > 0 ? 100 * static_cast<double>(certificate.clipped_weights()) / weights : 0.0,
           certificate.clipped_rows(), rows));
  Line(&text, "features", absl::StrFormat("%d dead of %d", certificate.dead_features(), features));
  if (certificate.has_underflow()) {
    const v1::Underflow& underflow = certificate.underflow();
    Line(&text, "underflow",
         absl::StrFormat("%d scales in %d of %d rows; their weights became zeros",
                         underflow.groups(), underflow.rows(), rows));
  }
  if (!certificate.calibration_id().empty()) {
    Line(&text, "calibration", Printable(certificate.calibration_id()));
  }
  Line(&text, "tokens",
       absl::StrFormat("%d fitted, %d held out", certificate.tokens(),
                       certificate.held_out_tokens()));
  Line(&text, "time", TimeText(certificate.phase_seconds()));
  for (const std::string& warning : certificate.warnings()) {
    Line(&text, "warning", Printable(warning));
  }
  return text;
}

}  // namespace certiq::cli
