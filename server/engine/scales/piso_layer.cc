#include "engine/scales/piso_layer.h"

#include <algorithm>
#include <cmath>

#include "engine/scales/column_accumulator.h"

namespace certiq::engine {
namespace {

constexpr int64_t kWidth = PackedMetric::kWidth;
// Rows of a task share each slice while it is in the second-level cache.
constexpr int64_t kTileRows = 4;
// Tasks that run at once at most: their breakpoints are what takes memory.
constexpr int64_t kTiles = 16;

// Some rows of W, sorted by group.
class PisoTile {
 public:
  PisoTile(const ResolvedSpec& spec, const PisoObjective& objective, const StripMatrix& weights,
           int64_t first_row, int64_t rows, Grid& grid)
      : objective_(objective),
        metric_(*objective.metric),
        first_row_(first_row),
        rows_(rows),
        grid_(grid),
        weights_(static_cast<size_t>(rows * metric_.features())),
        change_(weights_.size()),
        linear_(weights_.size()),
        searches_(static_cast<size_t>(rows), PisoRowSearch(spec)),
        active_(static_cast<size_t>(rows), 1) {
    const int64_t n = metric_.features();
    std::vector<float> row(static_cast<size_t>(n));
    std::vector<double> wide(row.size());
    for (int64_t r = 0; r < rows; ++r) {
      weights.GetRow(first_row + r, row.data());
      for (int64_t i = 0; i < n; ++i) weights_[At(r, i)] = row[Feature(i)];
      if (objective.linear == nullptr) continue;
      objective.linear->GetRow(first_row + r, wide.data());
      for (int64_t i = 0; i < n; ++i) linear_[At(r, i)] = wide[Feature(i)];
    }
  }

  // One pass over the groups; false where it changed nothing.
  bool Pass(int32_t pass, const RunContext& context) {
    std::vector<uint8_t> changed(active_.size(), 0);
    for (int64_t g = 0; g < std::min(metric_.groups(), objective_.groups); ++g) {
      if (context.cancelled()) return false;
      PassGroup(pass, g, changed);
    }
    active_ = changed;
    return std::find(changed.begin(), changed.end(), 1) != changed.end();
  }

 private:
  size_t At(int64_t r, int64_t i) const { return static_cast<size_t>(r * metric_.features() + i); }
  size_t Feature(int64_t i) const {
    return static_cast<size_t>(metric_.order()[static_cast<size_t>(i)]);
  }
  bool Active(int64_t r) const { return active_[static_cast<size_t>(r)] != 0; }
  PisoRowSearch& Search(int64_t r) { return searches_[static_cast<size_t>(r)]; }

  // y of group g given the other groups' codes, for every row.
  void GatherLinear(int64_t g, std::vector<double>& linear) const {
    const int64_t first = metric_.first(g);
    const int64_t size = metric_.size(g);
    for (int64_t r = 0; r < rows_; ++r) {
      double* to = linear.data() + r * size;
      std::copy_n(linear_.data() + At(r, first), size, to);
      if (objective_.passes > 0 || objective_.cross == nullptr) continue;
      for (int64_t i = first; i < first + size; ++i) {
        const double* row =
            objective_.cross->data() + static_cast<int64_t>(Feature(i)) * metric_.features();
        for (int64_t j = 0; j < size; ++j) to[j] += weights_[At(r, i)] * row[Feature(first + j)];
      }
    }
    if (objective_.passes == 0 || metric_.groups() == 1) return;
    for (int64_t t = 0; t < metric_.slices(g); ++t) {
      const int64_t live = std::min(kWidth, size - t * kWidth);
      for (int64_t r = 0; r < rows_; ++r) {
        if (!Active(r)) continue;
        ColumnAccumulator sums;
        for (int64_t i = 0; i < metric_.features(); ++i) {
          const double change = change_[At(r, i)];
          // Its own, and groups still at their weights.
          if (change == 0 || (i >= first && i < first + size)) continue;
          sums.Add(change, metric_.slice(g, t) + i * kWidth);
        }
        alignas(kVectorBytes) double stored[kWidth];
        sums.Store(stored);
        for (int64_t j = 0; j < live; ++j)
          linear[static_cast<size_t>(r * size + t * kWidth + j)] += stored[j];
      }
    }
  }

  void PassGroup(int32_t pass, int64_t g, std::vector<uint8_t>& changed) {
    const int64_t first = metric_.first(g);
    const int64_t size = metric_.size(g);
    std::vector<double> linear(static_cast<size_t>(rows_ * size));
    GatherLinear(g, linear);
    const auto for_slices = [&](const auto& body) {
      for (int64_t t = 0; t < metric_.slices(g); ++t) {
        for (int64_t r = 0; r < rows_; ++r) {
          if (Active(r)) body(Search(r), metric_.own(g, t), t, r);
        }
      }
    };
    for (int64_t r = 0; r < rows_; ++r) {
      if (!Active(r)) continue;
      const size_t at = Cell(r, g);
      Search(r).Begin(size, weights_.data() + At(r, first), linear.data() + r * size,
                      {grid_.scale[at], grid_.zero[at]});
    }
    for_slices([](PisoRowSearch& search, const float* slice, int64_t t, int64_t) {
      search.Weigh(slice, t);
    });
    for (int64_t r = 0; r < rows_; ++r) {
      if (Active(r)) Search(r).Sort();
    }
    std::vector<uint8_t> selected(static_cast<size_t>(rows_));
    for (int32_t zero = Search(0).first_zero(); zero <= Search(0).last_zero(); ++zero) {
      for (int64_t r = 0; r < rows_; ++r) {
        selected[static_cast<size_t>(r)] = Active(r) && Search(r).Select(zero) ? 1 : 0;
      }
      for_slices([&](PisoRowSearch& search, const float* slice, int64_t t, int64_t r) {
        if (selected[static_cast<size_t>(r)] != 0) search.Stream(slice, t);
      });
      for (int64_t r = 0; r < rows_; ++r) {
        if (selected[static_cast<size_t>(r)] != 0) Search(r).Minimise();
      }
    }
    for (int64_t r = 0; r < rows_; ++r) {
      if (!Active(r)) continue;
      const size_t at = Cell(r, g);
      const QuantParams start = grid_.Params(at);
      const QuantParams params = start.vanishes ? start : Search(r).best();
      if (pass == 0 || params.scale != grid_.scale[at] || params.zero != grid_.zero[at]) {
        changed[static_cast<size_t>(r)] = 1;
      }
      grid_.Set(at, params);
      Round(r, first, size, params);
    }
  }

  size_t Cell(int64_t r, int64_t g) const {
    return static_cast<size_t>((first_row_ + r) * grid_.groups + g);
  }

  // w - q of a group.
  void Round(int64_t r, int64_t first, int64_t size, QuantParams params) {
    const auto lowest = static_cast<float>(grid_.lowest_code);
    const auto highest = static_cast<float>(grid_.highest_code);
    const auto zero = static_cast<float>(params.zero);
    for (int64_t i = first; i < first + size; ++i) {
      const double w = weights_[At(r, i)];
      const float code =
          std::clamp(FreeCode(static_cast<float>(w), params.scale, zero), lowest, highest);
      change_[At(r, i)] =
          w - static_cast<double>(RoundTo(grid_.level_type, params.scale * (code - zero)));
    }
  }

  const PisoObjective& objective_;
  const PackedMetric& metric_;
  int64_t first_row_;
  int64_t rows_;
  Grid& grid_;
  // [rows][features], sorted by group: W, W - Q (0 before a group has codes), y.
  std::vector<double> weights_;
  std::vector<double> change_;
  std::vector<double> linear_;
  std::vector<PisoRowSearch> searches_;
  // Rows whose scales still change.
  std::vector<uint8_t> active_;
};

}  // namespace

QuantParams PisoQuantParams(PisoRowSearch& search, const PackedMetric& metric, int64_t group,
                            int64_t count, const double* weights, QuantParams start) {
  if (start.vanishes || !std::isfinite(start.scale)) return start;
  search.Begin(count, weights, nullptr, start);
  for (int64_t t = 0; t < metric.slices(group); ++t) search.Weigh(metric.own(group, t), t);
  search.Sort();
  for (int32_t zero = search.first_zero(); zero <= search.last_zero(); ++zero) {
    if (!search.Select(zero)) continue;
    for (int64_t t = 0; t < metric.slices(group); ++t) search.Stream(metric.own(group, t), t);
    search.Minimise();
  }
  return search.best();
}

absl::Status ImproveByPiso(const ResolvedSpec& spec, const PisoObjective& objective,
                           const StripMatrix& weights, const RunContext& context, Grid& grid) {
  const int32_t passes = grid.groups == 1 ? 1 : std::max(objective.passes, 1);
  const int64_t tiles = (grid.rows + kTileRows - 1) / kTileRows;
  for (int64_t wave = 0; wave < tiles; wave += kTiles) {
    context.executor->ParallelFor(std::min(kTiles, tiles - wave), [&](int64_t t) {
      const int64_t first = (wave + t) * kTileRows;
      PisoTile tile(spec, objective, weights, first, std::min(kTileRows, grid.rows - first), grid);
      for (int32_t pass = 0; pass < passes; ++pass) {
        if (!tile.Pass(pass, context)) return;
      }
    });
    if (context.cancelled()) return context.CancellationStatus();
    context.Report(Phase::kRound, static_cast<double>(std::min(wave + kTiles, tiles)) /
                                      static_cast<double>(tiles));
  }
  return absl::OkStatus();
}

int64_t PisoBytes(const ResolvedSpec& spec, int64_t features) {
  const int64_t group =
      spec.group_size == 0 ? features : std::min<int64_t>(spec.group_size, features);
  return kTiles * kTileRows * (PisoRowSearch::BytesFor(spec, group) + features * 40);
}

}  // namespace certiq::engine
