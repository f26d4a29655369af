#include "progress.h"

#include <algorithm>
#include <string>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "errors.h"

namespace certiq::cli {
namespace {

const char* PhaseText(v1::Phase phase) {
  switch (phase) {
    case v1::PHASE_RECEIVE:
      return "upload";
    case v1::PHASE_QUEUE:
      return "queue";
    case v1::PHASE_FACTOR:
      return "factor";
    case v1::PHASE_ROUND:
      return "round";
    case v1::PHASE_CERTIFY:
      return "certify";
    case v1::PHASE_REFERENCE:
      return "reference";
    case v1::PHASE_PACK:
      return "pack";
    default:
      return "working";
  }
}

}  // namespace

std::string BytesText(int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes < int64_t{1} << 10) return absl::StrFormat("%d B", bytes);
  if (bytes < int64_t{1} << 20) return absl::StrFormat("%.1f KiB", value / 1024);
  if (bytes < int64_t{1} << 30) return absl::StrFormat("%.1f MiB", value / (1 << 20));
  return absl::StrFormat("%.2f GiB", value / (1 << 30));
}

void ProgressPrinter::Show(const ProgressEvent& event) {
  if (const auto* const upload = std::get_if<UploadProgress>(&event)) {
    // The server's own progress has overtaken this report of the upload.
    if (phase_ > v1::PHASE_RECEIVE) return;
    const double fraction = upload->total_bytes == 0 ? 1
                                                     : static_cast<double>(upload->bytes) /
                                                           static_cast<double>(upload->total_bytes);
    ShowPhase(v1::PHASE_RECEIVE, fraction, BytesText(upload->total_bytes));
  } else if (const auto* const progress = std::get_if<v1::Progress>(&event)) {
    // The client knows the state of the upload better.
    if (progress->phase() == v1::PHASE_RECEIVE) return;
    ShowPhase(progress->phase(), progress->fraction(), "");
  } else if (const auto* const retry = std::get_if<RetryNotice>(&event)) {
    ShowRetry(*retry);
  }
}

void ProgressPrinter::ShowPhase(v1::Phase phase, double fraction, const std::string& note) {
  const bool changed = phase != phase_;
  phase_ = phase;
  const char* const gap = note.empty() ? "" : " ";
  if (!terminal_) {
    if (changed) err_ << absl::StrCat(PhaseText(phase), gap, note, "\n") << std::flush;
    return;
  }
  // Redrawing more often would only slow the upload down.
  const absl::Time now = absl::Now();
  if (!changed && fraction < 1 && now - drawn_ < absl::Milliseconds(50)) return;
  drawn_ = now;
  constexpr int kWidth = 30;
  // The server may send NaN and numbers out of range.
  const double share = fraction >= 0 ? std::min(fraction, 1.0) : 0.0;
  const int filled = static_cast<int>(share * kWidth);
  err_ << absl::StrFormat("\r\033[K%-9s [%s%s] %3.0f %%%s%s", PhaseText(phase),
                          std::string(static_cast<size_t>(filled), '#'),
                          std::string(static_cast<size_t>(kWidth - filled), '.'), 100 * share, gap,
                          note)
       << std::flush;
  bar_drawn_ = true;
}

void ProgressPrinter::ShowRetry(const RetryNotice& notice) {
  Wipe();
  err_ << absl::StrFormat("try %d: %s: %s; next in %.1f s\n", notice.attempt,
                          std::string(absl::StatusCodeToString(notice.error.code())),
                          Printable(notice.error.message()), absl::ToDoubleSeconds(notice.delay))
       << std::flush;
  phase_ = v1::PHASE_UNSPECIFIED;
}

void ProgressPrinter::Wipe() {
  if (bar_drawn_) err_ << "\r\033[K" << std::flush;
  bar_drawn_ = false;
}

}  // namespace certiq::cli
