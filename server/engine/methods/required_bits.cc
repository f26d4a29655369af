#include "engine/methods/required_bits.h"

#include <algorithm>
#include <cmath>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "engine/kernels/simd.h"
#include "engine/linalg/feedback_kernel.h"
#include "engine/methods/round_column.h"

namespace certiq::engine {
namespace {

// Tolerance at the edge of the grid, in scales: the rounding of a scale to float32 moves the edge
// of 8-bit grids by 2^-17.
constexpr double kTie = 1e-5;

// Rows of U^-1 that a task computes: they share each slice of U.
constexpr int64_t kTileRows = 128;

// Rows of U^-1 side by side, lane c holding row `rows[c]`.
class InverseRows {
 public:
  InverseRows(const FeedbackColumns& u, const int64_t* rows, int64_t live)
      : x_(static_cast<size_t>(u.features() * kStripRows)),
        first_row_(*std::min_element(rows, rows + live)) {
    std::fill_n(row_, kStripRows, int64_t{-1});
    std::copy_n(rows, live, row_);
    for (int64_t c = 0; c < live; ++c) x_[static_cast<size_t>(rows[c] * kStripRows + c)] = 1;
  }

  int64_t first_row() const { return first_row_; }
  float* data() { return x_.data(); }

  // Sum over lanes [from, to) of |x_j| or x_j^2, the diagonal left out.
  double SumOver(int64_t j, int64_t from, int64_t to, bool squares) const {
    const float* x = x_.data() + j * kStripRows;
    double value[kStripRows];
    for (int64_t c = 0; c < kStripRows; ++c) {
      const bool counts = c >= from && c < to && row_[c] != j;
      const double size = counts ? std::abs(static_cast<double>(x[c])) : 0.0;
      value[c] = squares ? size * size : size;
    }
    for (int64_t half = kStripRows / 2; half > 0; half /= 2) {
      for (int64_t c = 0; c < half; ++c) value[c] += value[c + half];
    }
    return value[0];
  }

 private:
  AlignedVector<float> x_;
  int64_t row_[kStripRows];
  int64_t first_row_;
};

}  // namespace

absl::StatusOr<std::vector<double>> InverseColumnSums(const ResolvedSpec& spec, const Grid& grid,
                                                      const FeedbackColumns& u,
                                                      const std::vector<bool>& dead,
                                                      const RunContext& context) {
  const int64_t n = u.features();
  const bool squares = spec.rounding == Rounding::kStochastic;
  // Rows by group, so that a task meets few groups.
  std::vector<int64_t> order;
  order.reserve(static_cast<size_t>(n));
  for (int64_t k = 0; k < n; ++k) {
    if (!dead[static_cast<size_t>(k)]) order.push_back(k);
  }
  const auto group_of = [&grid](int64_t k) { return grid.group_of[static_cast<size_t>(k)]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return group_of(a) < group_of(b); });
  const auto rows = static_cast<int64_t>(order.size());
  std::vector<double> sums(static_cast<size_t>(grid.groups * n));
  // A task's first and last group may have rows in other tasks too: their sums are added in order
  // of the tasks, whoever is done first.
  struct Shared {
    int32_t group = 0;
    std::vector<double> sums;
  };
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  std::vector<Shared> shared(static_cast<size_t>(2 * tiles));
  context.executor->ParallelFor(tiles, [&](int64_t tile) {
    const int64_t begin = tile * kTileRows;
    const int64_t end = std::min(rows, begin + kTileRows);
    std::vector<InverseRows> strips;
    strips.reserve(static_cast<size_t>(kTileRows / kStripRows));
    std::vector<RowsOverU> solves;
    for (int64_t at = begin; at < end; at += kStripRows) {
      strips.emplace_back(u, order.data() + at, std::min(kStripRows, end - at));
      solves.emplace_back(u, strips.back().data(), strips.back().first_row());
    }
    if (!SolveTile(u, solves, context)) return;
    Shared& first = shared[static_cast<size_t>(2 * tile)];
    Shared& last = shared[static_cast<size_t>(2 * tile + 1)];
    first.group = group_of(order[static_cast<size_t>(begin)]);
    last.group = group_of(order[static_cast<size_t>(end - 1)]);
    first.sums.resize(static_cast<size_t>(n));
    if (last.group != first.group) last.sums.resize(static_cast<size_t>(n));
    for (int64_t at = begin; at < end;) {
      // A run of rows of one group in one strip.
      const int32_t group = group_of(order[static_cast<size_t>(at)]);
      const int64_t strip = (at - begin) / kStripRows;
      const int64_t lane = at - begin - strip * kStripRows;
      int64_t stop = lane;
      while (stop < kStripRows && at < end && group_of(order[static_cast<size_t>(at)]) == group) {
        ++stop;
        ++at;
      }
      double* to = group == first.group  ? first.sums.data()
                   : group == last.group ? last.sums.data()
                                         : sums.data() + group * n;
      const InverseRows& inverse = strips[static_cast<size_t>(strip)];
      for (int64_t j = inverse.first_row(); j < n; ++j) {
        to[j] += inverse.SumOver(j, lane, stop, squares);
      }
    }
  });
  if (context.cancelled()) return context.CancellationStatus();
  for (const Shared& part : shared) {
    for (size_t j = 0; j < part.sums.size(); ++j) {
      sums[static_cast<size_t>(part.group * n) + j] += part.sums[j];
    }
  }
  return sums;
}

std::optional<int32_t> RequiredBits(const ResolvedSpec& spec, const Grid& grid,
                                    const std::vector<double>& sums, const StripMatrix& start,
                                    const RunContext& context) {
  const int64_t n = start.features();
  const bool nearest = spec.rounding == Rounding::kNearest;
  const double weights = static_cast<double>(grid.rows) * static_cast<double>(n);
  // Multiplies sqrt(sum delta^2 (U^-1)^2). Each row keeps one of its trials, whichever.
  const double reach =
      std::sqrt(0.5 * std::log(2 * weights * spec.scale_trials / spec.failure_probability));
  struct {
    base::Mutex mu;
    double levels ABSL_GUARDED_BY(mu) = 0;
  } largest;
  context.executor->ParallelFor(start.strips(), [&](int64_t s) {
    double strip_largest = 0;
    const StripGrid steps(grid, s * kStripRows);
    const int64_t live = std::min(kStripRows, grid.rows - s * kStripRows);
    const auto cells = static_cast<size_t>(grid.groups * kStripRows);
    // Extreme targets of each group. Rows that pad the strip have some too, which nobody reads.
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
      const float* from = start.strip(s) + j * kStripRows;
      double* lowest = low.data() + group * kStripRows;
      double* highest = high.data() + group * kStripRows;
      if (!nearest) {
        for (double& margin : move) margin = reach * std::sqrt(margin);
      }
      for (int64_t c = 0; c < kStripRows; ++c) {
        lowest[c] = std::min(lowest[c], from[c] - move[c]);
        highest[c] = std::max(highest[c], from[c] + move[c]);
      }
    }
    for (int64_t c = 0; c < live; ++c) {
      for (int64_t g = 0; g < grid.groups; ++g) {
        const auto cell = static_cast<size_t>(g * kStripRows + c);
        // No bits would give the group that vanishes another level.
        if (steps.Vanishes(g, c)) continue;
        // Cells reach half a step beyond the outermost levels; unbiased rounding must stay between
        // these. A weight at the very edge, as absmax puts the largest one, is a tie and no clip.
        const double beyond = nearest ? 0.5 : 0.0;
        const double step = steps.scale[cell];
        const double bottom = low[cell] / step + beyond + kTie;
        const double top = high[cell] / step - beyond - kTie;
        // A symmetric grid has as many levels on one side of zero as at it and on the other; zero
        // points are whole.
        const bool mirrored = steps.zero[cell] != static_cast<float>(1 << (spec.bits - 1));
        const double longer = mirrored ? std::max(top, 1 - bottom) : std::max(-bottom, top + 1);
        const double levels = spec.symmetric ? 2 * longer : std::ceil(top) - std::floor(bottom) + 1;
        strip_largest = std::isfinite(levels) ? std::max(strip_largest, levels) : INFINITY;
        if (!std::isfinite(strip_largest)) break;
      }
    }
    const base::MutexLock lock(largest.mu);
    largest.levels = std::max(largest.levels, strip_largest);
  });
  const base::MutexLock lock(largest.mu);
  const double bits = std::ceil(std::log2(std::max(2.0, largest.levels)));
  if (!(bits <= 31)) return std::nullopt;
  return static_cast<int32_t>(std::max(1.0, bits));
}

}  // namespace certiq::engine
