#include "verification_report.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace certiq::verify {
namespace {

bool Holds(double value, Range range) { return value >= range.low && value <= range.high; }

// "0.045130  (recomputed 0.045130, off by 2e-07)"; off by: relative.
std::string Comparison(double certified, double recomputed) {
  const double off =
      certified == recomputed ? 0 : std::abs(certified - recomputed) / std::abs(recomputed);
  return absl::StrFormat("%.6g  (recomputed %.6g, off by %.0e)", certified, recomputed, off);
}

}  // namespace

Range Around(double value, double relative, double absolute) {
  const double reach = relative * std::abs(value) + absolute;
  return {value - reach, value + reach};
}

void VerificationReport::Number(absl::string_view name, double certified, double recomputed,
                                Range range) {
  Claim(name, Holds(certified, range), Comparison(certified, recomputed));
}

void VerificationReport::Close(absl::string_view name, double certified, double recomputed,
                               double relative) {
  Number(name, certified, recomputed, Around(recomputed, relative));
}

void VerificationReport::OptionalClose(absl::string_view name, bool present, double certified,
                                       std::optional<double> expected, double relative) {
  if (present != expected.has_value()) {
    Claim(name, false,
          present ? absl::StrCat(certified, "  (expected none)")
                  : absl::StrCat("missing  (recomputed ", *expected, ")"));
  } else if (present) {
    Close(name, certified, *expected, relative);
  }
}

void VerificationReport::Rows(absl::string_view name, const std::vector<double>& certified,
                              const std::vector<double>& recomputed,
                              const std::vector<Range>& ranges) {
  if (certified.size() != recomputed.size()) {
    Claim(name, false, absl::StrCat(certified.size(), " rows, expected ", recomputed.size()));
    return;
  }
  bool holds = true;
  size_t worst = 0;
  double most = -1;
  int64_t bad = 0;
  for (size_t r = 0; r < certified.size(); ++r) {
    const bool row_holds = Holds(certified[r], ranges[r]);
    bad += row_holds ? 0 : 1;
    double off = std::abs(certified[r] - recomputed[r]) / std::abs(recomputed[r]);
    if (certified[r] == recomputed[r]) off = 0;
    if (std::isnan(off)) off = INFINITY;
    // The first row that is wrong hides those that hold.
    if ((holds && !row_holds) || (holds == row_holds && off > most)) {
      worst = r;
      most = off;
    }
    holds = holds && row_holds;
  }
  if (certified.empty()) return;
  std::string text =
      absl::StrCat("row ", worst, ": ", Comparison(certified[worst], recomputed[worst]));
  if (holds) {
    text =
        absl::StrFormat("%d rows  (the worst, row %d, off by %.0e)", certified.size(), worst, most);
  } else {
    absl::StrAppend(&text, "; ", bad, " of ", certified.size(), " rows are wrong");
  }
  Claim(name, holds, text);
}

void VerificationReport::Count(absl::string_view name, int64_t certified, int64_t low,
                               int64_t high) {
  const std::string expected = low == high ? absl::StrCat(low) : absl::StrCat(low, " to ", high);
  Claim(name, low <= certified && certified <= high,
        absl::StrCat(certified, "  (recomputed ", expected, ")"));
}

void VerificationReport::Same(absl::string_view name, absl::string_view certified,
                              absl::string_view recomputed) {
  if (certified == recomputed) {
    Claim(name, true, certified);
  } else {
    Claim(name, false, absl::StrCat("\"", certified, "\"  (expected \"", recomputed, "\")"));
  }
}

void VerificationReport::Claim(absl::string_view name, bool holds, absl::string_view text) {
  findings_.push_back(
      {holds ? Verdict::kHolds : Verdict::kWrong, std::string(name), std::string(text)});
}

void VerificationReport::NotChecked(absl::string_view name, absl::string_view reason) {
  findings_.push_back({Verdict::kNotChecked, std::string(name), absl::StrCat("(", reason, ")")});
}

int64_t VerificationReport::count(Verdict verdict) const {
  return std::count_if(findings_.begin(), findings_.end(),
                       [verdict](const Finding& finding) { return finding.verdict == verdict; });
}

}  // namespace certiq::verify
