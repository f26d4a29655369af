#include "engine/alphabet.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "engine/code_strip.h"
#include "engine/simd.h"

namespace certiq::engine {
namespace {

// In steps: the rounding of a scale to float32 moves the edge of 8-bit grids by 2^-17.
constexpr double kTie = 1e-5;

}  // namespace

absl::StatusOr<std::vector<double>> InverseColumnSums(const ResolvedSpec& spec, const Grid& grid,
                                                      const FeedbackColumns& u,
                                                      const std::vector<bool>& dead,
                                                      const RunContext& context) {
  const int64_t n = u.features();
  std::vector<double> sums(static_cast<size_t>(grid.groups * n));
  const int64_t strips = (n + kStripRows - 1) / kStripRows;
  context.executor->ParallelFor(strips, [&](int64_t strip) {
    if (context.cancelled()) return;
    // Columns [j0, j0 + kStripRows) of X = U^-1, from U X = I: rows end - 1 down to 0.
    const int64_t j0 = strip * kStripRows;
    const int64_t live = std::min<int64_t>(kStripRows, n - j0);
    const int64_t end = j0 + live;
    std::vector<float> x(static_cast<size_t>(end * kStripRows));
    for (int64_t c = 0; c < live; ++c) x[static_cast<size_t>((j0 + c) * kStripRows + c)] = 1;
    std::vector<float> sum(static_cast<size_t>(kPanelRows * kStripRows));
    for (int64_t b = (end - 1) / kPanelRows; b >= 0; --b) {
      const int64_t begin = b * kPanelRows;
      const int64_t rows = std::min(kPanelRows, end - begin);
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t later = b + 1; later * kPanelRows < end; ++later) {
        const int64_t k0 = later * kPanelRows;
        MultiplyIntoStrip(rows, std::min(kPanelRows, end - k0), u.block(later) + begin * kPanelRows,
                          int64_t{1}, kPanelRows, x.data() + k0 * kStripRows, sum.data());
      }
      const float* square = u.block(b) + begin * kPanelRows;
      for (int64_t i = rows - 1; i >= 0; --i) {
        float* to = x.data() + (begin + i) * kStripRows;
        for (int64_t c = 0; c < kStripRows; ++c)
          to[c] -= sum[static_cast<size_t>(i * kStripRows + c)];
        for (int64_t k = i + 1; k < rows; ++k) {
          const float feedback = square[i * kPanelRows + k];
          const float* from = x.data() + (begin + k) * kStripRows;
          for (int64_t c = 0; c < kStripRows; ++c) to[c] -= feedback * from[c];
        }
      }
    }
    for (int64_t k = 0; k < end; ++k) {
      if (dead[static_cast<size_t>(k)]) continue;
      double* to = sums.data() + grid.group_of[static_cast<size_t>(k)] * n + j0;
      for (int64_t c = 0; c < live; ++c) {
        if (k >= j0 + c) continue;
        const double value = x[static_cast<size_t>(k * kStripRows + c)];
        to[c] += spec.rounding == Rounding::kNearest ? std::abs(value) : value * value;
      }
    }
  });
  if (context.cancelled()) return context.CancellationStatus();
  return sums;
}

std::optional<int32_t> BitsNeeded(const ResolvedSpec& spec, const Grid& grid,
                                  const std::vector<double>& sums, const StripMatrix& start,
                                  const RunContext& context) {
  const int64_t n = start.features();
  const bool nearest = spec.rounding == Rounding::kNearest;
  const double weights = static_cast<double>(grid.rows) * static_cast<double>(n);
  // Multiplies sqrt(sum delta^2 (U^-1)^2).
  const double reach = std::sqrt(0.5 * std::log(2 * weights / spec.failure_probability));
  std::mutex mutex;
  double largest = 0;
  context.executor->ParallelFor(start.strips(), [&](int64_t s) {
    double strip_largest = 0;
    const StripGrid steps(grid, s * kStripRows);
    const int64_t live = std::min(kStripRows, grid.rows - s * kStripRows);
    const auto cells = static_cast<size_t>(grid.groups * kStripRows);
    // Extreme targets of each group, in steps.
    std::vector<double> low(cells, 0.0);
    std::vector<double> high(cells, 0.0);
    for (int64_t j = 0; j < n; ++j) {
      double move[kStripRows] = {};
      for (int64_t g = 0; g < grid.groups && !sums.empty(); ++g) {
        const double sum = sums[static_cast<size_t>(g * n + j)];
        if (sum == 0) continue;
        for (int64_t c = 0; c < kStripRows; ++c) {
          const double step = steps.scale[static_cast<size_t>(g * kStripRows + c)];
          move[c] += nearest ? 0.5 * step * sum : step * step * sum;
        }
      }
      const int64_t group = grid.group_of[static_cast<size_t>(j)];
      for (int64_t c = 0; c < live; ++c) {
        const auto cell = static_cast<size_t>(group * kStripRows + c);
        const double step = steps.scale[cell];
        const double margin = nearest ? move[c] : reach * std::sqrt(move[c]);
        const double from = start.strip(s)[j * kStripRows + c];
        low[cell] = std::min(low[cell], (from - margin) / step);
        high[cell] = std::max(high[cell], (from + margin) / step);
      }
    }
    for (int64_t c = 0; c < live; ++c) {
      for (int64_t g = 0; g < grid.groups; ++g) {
        const auto cell = static_cast<size_t>(g * kStripRows + c);
        // Cells reach half a step beyond the outermost levels; unbiased rounding must stay between
        // these. A weight at the very edge, as absmax puts the largest one, is a tie and no clip.
        const double beyond = nearest ? 0.5 : 0.0;
        const double bottom = low[cell] + beyond + kTie;
        const double top = high[cell] - beyond - kTie;
        // A symmetric grid has as many levels below zero as at and above it; zero points are whole.
        const double levels = spec.symmetric ? 2 * std::max(-bottom, top + 1)
                                             : std::ceil(top) - std::floor(bottom) + 1;
        strip_largest = std::isfinite(levels) ? std::max(strip_largest, levels) : INFINITY;
        if (!std::isfinite(strip_largest)) break;
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    largest = std::max(largest, strip_largest);
  });
  const double bits = std::ceil(std::log2(std::max(2.0, largest)));
  if (!(bits <= 31)) return std::nullopt;
  return static_cast<int32_t>(std::max(1.0, bits));
}

}  // namespace certiq::engine
