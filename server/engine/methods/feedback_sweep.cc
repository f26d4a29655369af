#include "engine/methods/feedback_sweep.h"

#include <algorithm>
#include <cstring>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "engine/methods/strip_sweep.h"

namespace certiq::engine {
namespace {

// Rows of a task: more rows share each slice of U, fewer balance better. With 4096 features 256
// rows of targets are 4 MiB, which a third-level cache holds for every thread.
constexpr int64_t kTileRows = 256;
// Tiles are smaller where there are fewer rows than this many tiles.
constexpr int64_t kWantedTiles = 16;
static_assert(kTileRows % kStripRows == 0);

// Eight rows of eight bytes to eight columns.
void TransposeBytes(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
  uint64_t row[8];
  for (int i = 0; i < 8; ++i) std::memcpy(&row[i], from + i * from_stride, sizeof(uint64_t));
  const auto exchange = [&row](int apart, int shift, uint64_t mask) {
    for (int i = 0; i < 8; ++i) {
      if ((i & apart) != 0) continue;
      const uint64_t swap = ((row[i] >> shift) ^ row[i + apart]) & mask;
      row[i] ^= swap << shift;
      row[i + apart] ^= swap;
    }
  };
  exchange(4, 32, 0x00000000ffffffffu);
  exchange(2, 16, 0x0000ffff0000ffffu);
  exchange(1, 8, 0x00ff00ff00ff00ffu);
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_stride, &row[i], sizeof(uint64_t));
}

// Codes of a block, [columns][kStripRows], to rows of `features`; `live` rows count.
void CopyCodes(const uint8_t* codes, int64_t columns, int64_t live, int64_t features, uint8_t* to) {
  if (live < kStripRows || columns % 8 != 0) {
    for (int64_t c = 0; c < live; ++c) {
      for (int64_t j = 0; j < columns; ++j) to[c * features + j] = codes[j * kStripRows + c];
    }
    return;
  }
  for (int64_t c = 0; c < kStripRows; c += 8) {
    for (int64_t j = 0; j < columns; j += 8) {
      TransposeBytes(codes + j * kStripRows + c, kStripRows, to + c * features + j, features);
    }
  }
}

// What a strip's sweep found, row by row the best of several where there are several.
struct StripResult {
  StripSums sums;
  StripGrid steps;

  // Takes row c of another strip's result.
  void TakeRow(int64_t c, const StripSweep& sweep) {
    const StripSums& from = sweep.sums();
    sums.damped[c] = from.damped[c];
    sums.bound[c] = from.bound[c];
    sums.widest[c] = from.widest[c];
    sums.clipped_reach[c] = from.clipped_reach[c];
    sums.clipped[c] = from.clipped[c];
    sums.overshoot[c] = from.overshoot[c];
    for (auto at = static_cast<size_t>(c); at < steps.scale.size(); at += kStripRows) {
      steps.scale[at] = sweep.steps().scale[at];
      steps.zero[at] = sweep.steps().zero[at];
      steps.inverse[at] = sweep.steps().inverse[at];
    }
  }
};

// Copies what a strip's sweep found into the layer's results, and its scales where they are new.
void Collect(const StripSums& sums, const StripGrid& steps, int64_t first_row, int64_t live,
             bool new_steps, RoundedLayer& result) {
  Grid& grid = result.grid;
  for (int64_t c = 0; c < live; ++c) {
    const auto r = static_cast<size_t>(first_row + c);
    result.rounding[r] = sums.damped[c];
    result.bound[r] = sums.bound[c];
    result.clipped[r] = sums.clipped[c];
    if (!result.widest.empty()) {
      result.widest[r] = sums.widest[c];
      result.clipped_reach[r] = sums.clipped_reach[c];
    }
    if (!new_steps) continue;
    for (int64_t g = 0; g < grid.groups; ++g) {
      const auto from = static_cast<size_t>(g * kStripRows + c);
      const auto to = static_cast<size_t>((first_row + c) * grid.groups + g);
      grid.Set(to, steps.Params(from));
    }
  }
}

// Some strips of rows that pass through the sweep together.
class SweepTile {
 public:
  SweepTile(const ResolvedSpec& spec, const SweepRules& rules, const FeedbackColumns& u,
            const std::vector<double>& d, const DiagonalMetric& metric, const Grid& grid,
            int64_t first_strip, int64_t strips, StripMatrix& weights)
      : spec_(spec),
        rules_(rules),
        u_(u),
        d_(d),
        metric_(metric),
        grid_(grid),
        first_(first_strip),
        strips_(strips),
        weights_(weights) {}

  // One sweep of all strips, with every scale times `multiplier`. `w` is the tile's weights, which
  // turn into weights minus levels; codes go to rows of `codes`. `done` is called after each block.
  // Without strips where it was cancelled.
  template <typename Done>
  std::vector<StripSweep> SweepOnce(float multiplier, float* w, uint8_t* codes,
                                    const RunContext& context, const Done& done) const {
    std::vector<StripSweep> sweeps;
    sweeps.reserve(static_cast<size_t>(strips_));
    for (int64_t s = 0; s < strips_; ++s) {
      sweeps.emplace_back(spec_, rules_, u_, d_, metric_, grid_, (first_ + s) * kStripRows,
                          multiplier, w + s * StripSize());
    }
    for (int64_t b = 0; b < u_.blocks(); ++b) {
      if (context.cancelled()) return {};
      const int64_t begin = b * kPanelRows;
      const int64_t columns = u_.end(b) - begin;
      for (StripSweep& sweep : sweeps) sweep.Begin(b);
      AddFeedbackBefore(u_, b, sweeps);
      for (int64_t g = 0; g * kMicroRows < columns; ++g) {
        for (StripSweep& sweep : sweeps) sweep.AddFeedbackWithin(b, g);
        // Column by column over all strips: each waits for its own column before only.
        for (int64_t j = g * kMicroRows; j < std::min((g + 1) * kMicroRows, columns); ++j) {
          for (StripSweep& sweep : sweeps) sweep.RoundColumn(b, j);
        }
      }
      for (int64_t s = 0; s < strips_; ++s) {
        CopyCodes(sweeps[static_cast<size_t>(s)].codes(), columns, Live(s), u_.features(),
                  codes + s * kStripRows * u_.features() + begin);
      }
      done();
    }
    return sweeps;
  }

  // The spec's sweep, or for every row the best of the trials.
  template <typename Done>
  void Sweep(RoundedLayer& result, const RunContext& context, const Done& done) {
    const int64_t features = u_.features();
    uint8_t* const codes = result.codes.data() + first_ * kStripRows * features;
    float* const w = weights_.strip(first_);
    if (rules_.multipliers.empty()) {
      const std::vector<StripSweep> sweeps = SweepOnce(1, w, codes, context, done);
      const bool dynamic = rules_.first_dynamic_group < grid_.groups;
      for (size_t s = 0; s < sweeps.size(); ++s) {
        Finish(static_cast<int64_t>(s), sweeps[s].sums(), sweeps[s].steps(), dynamic, result);
      }
      return;
    }
    const AlignedVector<float> start(w, w + strips_ * StripSize());
    AlignedVector<float> tried(start.size());
    UnsetVector<uint8_t> tried_codes(static_cast<size_t>(Row(strips_) * features));
    std::vector<StripResult> best;
    std::vector<double> errors(static_cast<size_t>(strips_ * kStripRows));
    for (const float multiplier : rules_.multipliers) {
      std::copy(start.begin(), start.end(), tried.begin());
      const std::vector<StripSweep> sweeps =
          SweepOnce(multiplier, tried.data(), tried_codes.data(), context, done);
      if (sweeps.empty()) return;
      const bool first = best.empty();
      for (int64_t s = 0; s < strips_; ++s) {
        const StripSweep& sweep = sweeps[static_cast<size_t>(s)];
        if (first) best.push_back({sweep.sums(), sweep.steps()});
        StripResult& kept = best[static_cast<size_t>(s)];
        for (int64_t c = 0; c < Live(s); ++c) {
          const double error =
              sweep.sums().damped[c] + First(s, c, tried[static_cast<size_t>(s * StripSize() + c)]);
          double& least = errors[static_cast<size_t>(s * kStripRows + c)];
          // The first has the scales that were found.
          if (!first && !(error < least)) continue;
          least = error;
          kept.TakeRow(c, sweep);
          const int64_t row = (s * kStripRows + c) * features;
          std::copy_n(tried_codes.data() + row, features, codes + row);
          const float* from = tried.data() + s * StripSize() + c;
          float* to = w + s * StripSize() + c;
          for (int64_t j = 0; j < features; ++j) to[j * kStripRows] = from[j * kStripRows];
        }
      }
    }
    for (int64_t s = 0; s < strips_; ++s) {
      const StripResult& kept = best[static_cast<size_t>(s)];
      Finish(s, kept.sums, kept.steps, true, result);
    }
  }

  // The largest of all its rows.
  double overshoot() const { return overshoot_; }

 private:
  int64_t StripSize() const { return u_.features() * kStripRows; }
  // First row of strip s, in the tile; s = strips: the rows it has.
  int64_t Row(int64_t s) const {
    return std::min(s * kStripRows, grid_.rows - first_ * kStripRows);
  }
  // Rows of strip s that are no padding.
  int64_t Live(int64_t s) const { return Row(s + 1) - Row(s); }

  // What the first feature adds for row c of strip s, beside its D of zero.
  double First(int64_t s, int64_t c, float change) const {
    if (rules_.first == nullptr) return 0;
    const double shift = rules_.first->shift[static_cast<size_t>((first_ + s) * kStripRows + c)];
    const double left = static_cast<double>(change) + shift;
    return rules_.first->d * left * left;
  }

  void Finish(int64_t s, const StripSums& sums, const StripGrid& steps, bool new_steps,
              RoundedLayer& result) {
    Collect(sums, steps, (first_ + s) * kStripRows, Live(s), new_steps, result);
    for (int64_t c = 0; c < Live(s); ++c) {
      overshoot_ = std::max(overshoot_, static_cast<double>(sums.overshoot[c]));
    }
  }

  const ResolvedSpec& spec_;
  const SweepRules& rules_;
  const FeedbackColumns& u_;
  const std::vector<double>& d_;
  const DiagonalMetric& metric_;
  const Grid& grid_;
  int64_t first_;
  int64_t strips_;
  StripMatrix& weights_;
  double overshoot_ = 0;
};

}  // namespace

absl::Status FeedbackSweep(const ResolvedSpec& spec, const SweepRules& rules,
                           const FeedbackColumns& u, const std::vector<double>& bound_d,
                           StripMatrix& weights, RoundedLayer& result, const RunContext& context) {
  const auto rows = static_cast<size_t>(weights.rows());
  const int64_t features = weights.features();
  result.codes.resize(rows * static_cast<size_t>(features));
  result.rounding.resize(rows);
  result.bound.resize(rows);
  result.clipped.resize(rows);
  if (spec.rounding == Rounding::kStochastic) {
    result.widest.resize(rows);
    result.clipped_reach.resize(rows);
  }
  const Grid& grid = result.grid;
  const DiagonalMetric metric = rules.first_dynamic_group < grid.groups && HasMetric(spec.scale)
                                    ? DiagonalMetric(rules.metric->diagonal)
                                    : DiagonalMetric();

  const int64_t tile_strips =
      std::clamp<int64_t>(weights.strips() / kWantedTiles, 1, kTileRows / kStripRows);
  const int64_t tiles = (weights.strips() + tile_strips - 1) / tile_strips;
  const int64_t sweeps = std::max<int64_t>(1, static_cast<int64_t>(rules.multipliers.size()));
  struct {
    base::Mutex mu;
    int64_t blocks_done ABSL_GUARDED_BY(mu) = 0;
    double overshoot ABSL_GUARDED_BY(mu) = 0;
  } all;
  const auto done = [&] {
    const base::MutexLock lock(all.mu);
    ++all.blocks_done;
    context.Report(Phase::kRound, static_cast<double>(all.blocks_done) /
                                      static_cast<double>(tiles * u.blocks() * sweeps));
  };

  context.executor->ParallelFor(tiles, [&](int64_t at) {
    const int64_t first = at * tile_strips;
    SweepTile tile(spec, rules, u, bound_d, metric, grid, first,
                   std::min(tile_strips, weights.strips() - first), weights);
    tile.Sweep(result, context, done);
    const base::MutexLock lock(all.mu);
    all.overshoot = std::max(all.overshoot, tile.overshoot());
  });
  if (context.cancelled()) return context.CancellationStatus();
  const base::MutexLock lock(all.mu);
  result.worst_overshoot = all.overshoot;
  return absl::OkStatus();
}

}  // namespace certiq::engine
