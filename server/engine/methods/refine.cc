#include "engine/methods/refine.h"

#include <Eigen/Cholesky>
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "base/mutex.h"
#include "engine/methods/refine_form.h"
#include "engine/methods/round_column.h"

namespace certiq::engine {
namespace {

// Strips of a tile: they share each slice of H.
constexpr int64_t kTileStrips = 4;
constexpr int64_t kWantedTiles = 16;
// Rounds inside a block of features before the next one: they cost little, since r is at hand.
constexpr int32_t kRounds = 3;
// A move must lower f by this share of H_jj d^2: not for float32's rounding of r.
constexpr float kLeastGain = 1e-5f;
// Groups whose scales are fitted together: their system is kJointGroups^2 float64 a row.
constexpr int64_t kJointGroups = 64;
// Scales that move by less, relative, are left as they are.
constexpr double kLeastStretch = 1e-4;
// Share of the diagonal of A that is added to it: makes a system of collinear groups definite.
constexpr double kRidge = 1e-10;

// Group by group, in the working order inside a group.
std::vector<int64_t> GroupedOrder(const std::vector<int32_t>& group_of) {
  std::vector<int64_t> order(group_of.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return group_of[static_cast<size_t>(a)] < group_of[static_cast<size_t>(b)];
  });
  return order;
}

inline float LevelOf(const StripGrid& grid, int64_t at, float code) {
  const float level =
      grid.scale[static_cast<size_t>(at)] * (code - grid.zero[static_cast<size_t>(at)]);
  return grid.level_type == DType::kF32 ? level : RoundTo(grid.level_type, level);
}

// A strip of rows, features in the form's order.
struct RefineStrip {
  RefineStrip(int64_t at, const Grid& grid) : index(at), steps(grid, at * kStripRows) {}

  int64_t index;
  StripGrid steps;
  // c = w - q [features][kStripRows], codes of the same shape, K = u - z while scales are fitted.
  AlignedVector<float> change;
  UnsetVector<uint8_t> codes;
  AlignedVector<float> multiples;
  // r of the block at hand, and products with K; [kPanelRows][kStripRows].
  AlignedVector<float> r;
  AlignedVector<float> product;
  // A [groups][groups][kStripRows], upper triangle, and K^T r [groups][kStripRows].
  std::vector<double> a;
  std::vector<double> b;
  bool active = true;
  bool moved = false;
};

class RefineTile {
 public:
  RefineTile(const MethodInput& input, const RefineForm& form, const Grid& grid,
             const std::vector<int64_t>& first_of_group, int64_t first_strip, int64_t strips,
             const UnsetVector<uint8_t>& codes)
      : input_(input),
        weights_(input.layer.weights()),
        form_(form),
        group_of_(form.order().size()),
        first_(first_of_group) {
    for (size_t i = 0; i < group_of_.size(); ++i) {
      group_of_[i] = grid.group_of[static_cast<size_t>(form.order()[i])];
    }
    const int64_t n = form.features();
    for (int64_t s = first_strip; s < first_strip + strips; ++s) {
      RefineStrip& strip = strips_.emplace_back(s, grid);
      strip.change.resize(static_cast<size_t>(n * kStripRows));
      strip.codes.resize(static_cast<size_t>(n * kStripRows));
      strip.r.resize(static_cast<size_t>(kPanelRows * kStripRows));
      for (int64_t i = 0; i < n; ++i) {
        float code[kStripRows];
        LoadCodes(codes, n, s * kStripRows, form.order()[static_cast<size_t>(i)], strip.steps,
                  code);
        for (int64_t c = 0; c < kStripRows; ++c) {
          strip.codes[static_cast<size_t>(i * kStripRows + c)] = static_cast<uint8_t>(code[c]);
        }
        RenewChange(strip, i);
      }
    }
  }

  // Returns the passes taken; stops early where it was cancelled.
  int32_t Run(const RunContext& context) {
    int32_t pass = 0;
    const auto active = [](const RefineStrip& strip) { return strip.active; };
    while (pass < input_.spec.polish && std::any_of(strips_.begin(), strips_.end(), active)) {
      for (RefineStrip& strip : strips_) strip.moved = false;
      if (input_.spec.grid == nullptr) RefitScales(context);
      for (int64_t b = 0; b < form_.blocks(); ++b) {
        if (context.cancelled()) return pass;
        FormResidual(b);
        for (RefineStrip& strip : strips_) {
          if (strip.active) DescendBlock(strip, b);
        }
      }
      for (RefineStrip& strip : strips_) strip.active = strip.active && strip.moved;
      ++pass;
    }
    return pass;
  }

  void Store(Grid& grid, UnsetVector<uint8_t>& codes) const {
    const int64_t n = form_.features();
    for (const RefineStrip& strip : strips_) {
      const int64_t first_row = strip.index * kStripRows;
      for (int64_t c = 0; c < std::min(kStripRows, grid.rows - first_row); ++c) {
        uint8_t* row = codes.data() + (first_row + c) * n;
        for (int64_t i = 0; i < n; ++i) {
          row[form_.order()[static_cast<size_t>(i)]] =
              strip.codes[static_cast<size_t>(i * kStripRows + c)];
        }
        for (int64_t g = 0; g < grid.groups; ++g) {
          grid.scale[static_cast<size_t>((first_row + c) * grid.groups + g)] =
              strip.steps.scale[static_cast<size_t>(g * kStripRows + c)];
        }
      }
    }
  }

 private:
  // c of feature i from its codes.
  void RenewChange(RefineStrip& strip, int64_t i) const {
    const int64_t feature = form_.order()[static_cast<size_t>(i)];
    const int64_t group = group_of_[static_cast<size_t>(i)];
    const float* w = weights_.strip(strip.index) + feature * kStripRows;
    float* change = strip.change.data() + i * kStripRows;
    const uint8_t* codes = strip.codes.data() + i * kStripRows;
    for (int64_t c = 0; c < kStripRows; ++c) {
      change[c] = w[c] - LevelOf(strip.steps, group * kStripRows + c, codes[c]);
    }
  }

  // Products of block b with columns [k0, k1) of each active strip's `x`, added to its `out`.
  void AddProducts(int64_t b, int64_t k0, int64_t k1, AlignedVector<float> RefineStrip::*x,
                   AlignedVector<float> RefineStrip::*out) {
    for (int64_t k = k0; k < k1; k += RefineForm::kSlice) {
      for (RefineStrip& strip : strips_) {
        if (!strip.active) continue;
        form_.AddSlice(b, k, std::min(k1, k + RefineForm::kSlice), (strip.*x).data(),
                       (strip.*out).data());
      }
    }
  }

  // r = H c + y for the features of block b, from c as it is.
  void FormResidual(int64_t b) {
    for (RefineStrip& strip : strips_) {
      std::fill(strip.r.begin(), strip.r.end(), 0.0f);
      if (input_.layer.initial_error() == nullptr) continue;
      // A strip of float32 is two of float64.
      constexpr int64_t kHalf = kStrip<double>;
      const BasicStripMatrix<double>& cross = input_.layer.initial->cross;
      for (int64_t i = form_.begin(b); i < form_.end(b); ++i) {
        const int64_t feature = form_.order()[static_cast<size_t>(i)];
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t from_strip = 2 * strip.index + half;
          if (from_strip >= cross.strips()) break;
          const double* y = cross.strip(from_strip) + feature * kHalf;
          float* r = strip.r.data() + (i - form_.begin(b)) * kStripRows + half * kHalf;
          for (int64_t c = 0; c < kHalf; ++c) r[c] = static_cast<float>(form_.unit() * y[c]);
        }
      }
    }
    AddProducts(b, 0, form_.features(), &RefineStrip::change, &RefineStrip::r);
  }

  // (S7) over the features of block b.
  void DescendBlock(RefineStrip& strip, int64_t b) const {
    for (int32_t round = 0; round < kRounds; ++round) {
      bool moved = false;
      for (int64_t i = form_.begin(b); i < form_.end(b); ++i) {
        if (input_.layer.dead[static_cast<size_t>(form_.order()[static_cast<size_t>(i)])]) continue;
        moved = DescendFeature(strip, b, i) || moved;
      }
      if (!moved) return;
      strip.moved = true;
    }
  }

  bool DescendFeature(RefineStrip& strip, int64_t b, int64_t i) const {
    const int64_t group = group_of_[static_cast<size_t>(i)];
    const float h = form_.diagonal(i);
    const float* r = strip.r.data() + (i - form_.begin(b)) * kStripRows;
    uint8_t* codes = strip.codes.data() + i * kStripRows;
    alignas(kVectorBytes) float level[kStripRows];
    alignas(kVectorBytes) float target[kStripRows];
    alignas(kVectorBytes) float code[kStripRows];
    alignas(kVectorBytes) float step[kStripRows];
    for (int64_t c = 0; c < kStripRows; ++c) {
      level[c] = LevelOf(strip.steps, group * kStripRows + c, codes[c]);
      target[c] = level[c] + r[c] / h;
    }
    NearestCodes(strip.steps, group, target, code);
    int32_t any = 0;
    for (int64_t c = 0; c < kStripRows; ++c) {
      const float d = level[c] - LevelOf(strip.steps, group * kStripRows + c, code[c]);
      const bool falls = d * (2 * r[c] + h * d) < -kLeastGain * h * d * d;
      step[c] = falls ? d : 0.0f;
      any |= falls ? 1 : 0;
    }
    if (any == 0) return false;
    for (int64_t c = 0; c < kStripRows; ++c) {
      if (step[c] != 0) codes[c] = static_cast<uint8_t>(code[c]);
    }
    RenewChange(strip, i);
    form_.AddColumn(b, i, step, strip.r.data());
    return true;
  }

  // (S6), a lot of groups after the other.
  void RefitScales(const RunContext& context) {
    const auto groups = static_cast<int64_t>(first_.size()) - 1;
    for (RefineStrip& strip : strips_) {
      strip.multiples.resize(strip.change.size());
      strip.product.resize(strip.r.size());
      for (size_t i = 0; i < group_of_.size(); ++i) {
        for (int64_t c = 0; c < kStripRows; ++c) {
          const size_t at = i * kStripRows + static_cast<size_t>(c);
          strip.multiples[at] =
              static_cast<float>(strip.codes[at]) -
              strip.steps.zero[static_cast<size_t>(group_of_[i] * kStripRows + c)];
        }
      }
    }
    for (int64_t g0 = 0; g0 < groups; g0 += kJointGroups) {
      const int64_t g1 = std::min(groups, g0 + kJointGroups);
      for (RefineStrip& strip : strips_) {
        strip.a.assign(static_cast<size_t>((g1 - g0) * (g1 - g0) * kStripRows), 0);
        strip.b.assign(static_cast<size_t>((g1 - g0) * kStripRows), 0);
      }
      const int64_t begin = first_[static_cast<size_t>(g0)];
      const int64_t end = first_[static_cast<size_t>(g1)];
      for (int64_t b = begin / kPanelRows; form_.begin(b) < end; ++b) {
        if (context.cancelled()) return;
        AddBlock(b, g0, g1);
      }
      for (RefineStrip& strip : strips_) {
        if (!strip.active) continue;
        for (int64_t c = 0; c < kStripRows; ++c) SolveRow(strip, c, g0, g1);
        for (int64_t i = begin; i < end; ++i) RenewChange(strip, i);
      }
    }
  }

  // Adds what the features of block b that belong to groups [g0, g1) have in A and K^T r. Of two
  // features of one group in different blocks only the earlier one is met, and counts twice.
  void AddBlock(int64_t b, int64_t g0, int64_t g1) {
    const int64_t begin = std::max(form_.begin(b), first_[static_cast<size_t>(g0)]);
    const int64_t end = std::min(form_.end(b), first_[static_cast<size_t>(g1)]);
    FormResidual(b);
    for (RefineStrip& strip : strips_) {
      if (!strip.active) continue;
      for (int64_t i = begin; i < end; ++i) {
        double* to = strip.b.data() + (group_of_[static_cast<size_t>(i)] - g0) * kStripRows;
        AddDots(strip, i, b, strip.r, 1, to);
      }
    }
    for (int64_t h = group_of_[static_cast<size_t>(begin)]; h < g1; ++h) {
      const int64_t from = std::max(first_[static_cast<size_t>(h)], form_.begin(b));
      const int64_t to = first_[static_cast<size_t>(h) + 1];
      const int64_t middle = std::clamp(form_.end(b), from, to);
      AddCross(b, begin, end, h, from, middle, 1, g0, g1);
      AddCross(b, begin, end, h, middle, to, 2, g0, g1);
    }
  }

  // K_i H_i,k K_k for i of [begin, end) and k of [k0, k1), which is of group h; within a group
  // `times` as often.
  void AddCross(int64_t b, int64_t begin, int64_t end, int64_t h, int64_t k0, int64_t k1,
                double times, int64_t g0, int64_t g1) {
    if (k0 >= k1) return;
    for (RefineStrip& strip : strips_) std::fill(strip.product.begin(), strip.product.end(), 0.0f);
    AddProducts(b, k0, k1, &RefineStrip::multiples, &RefineStrip::product);
    for (RefineStrip& strip : strips_) {
      if (!strip.active) continue;
      for (int64_t i = begin; i < end && group_of_[static_cast<size_t>(i)] <= h; ++i) {
        const int64_t g = group_of_[static_cast<size_t>(i)];
        double* to = strip.a.data() + ((g - g0) * (g1 - g0) + h - g0) * kStripRows;
        AddDots(strip, i, b, strip.product, g == h ? times : 1, to);
      }
    }
  }

  // to += times K_i values_i, row by row.
  void AddDots(const RefineStrip& strip, int64_t i, int64_t b, const AlignedVector<float>& values,
               double times, double* to) const {
    const float* k = strip.multiples.data() + i * kStripRows;
    const float* v = values.data() + (i - form_.begin(b)) * kStripRows;
    for (int64_t c = 0; c < kStripRows; ++c) {
      to[c] += times * static_cast<double>(k[c]) * static_cast<double>(v[c]);
    }
  }

  // New scales of groups [g0, g1) of row c of the strip, where they lower f.
  void SolveRow(RefineStrip& strip, int64_t c, int64_t g0, int64_t g1) const {
    const int64_t size = g1 - g0;
    Eigen::MatrixXd a(size, size);
    Eigen::VectorXd b(size);
    for (int64_t g = 0; g < size; ++g) {
      b[g] = strip.b[static_cast<size_t>(g * kStripRows + c)];
      for (int64_t h = g; h < size; ++h) {
        a(g, h) = a(h, g) = strip.a[static_cast<size_t>((g * size + h) * kStripRows + c)];
      }
    }
    Eigen::MatrixXd damped = a;
    for (int64_t g = 0; g < size; ++g) {
      damped(g, g) += kRidge * a(g, g);
      // A group of zeros has no say, and keeps its scale.
      if (!(a(g, g) > 0)) damped(g, g) = 1;
    }
    Eigen::VectorXd moves = damped.ldlt().solve(b);
    double furthest = 0;
    std::vector<QuantParams> params(static_cast<size_t>(size));
    for (int64_t g = 0; g < size; ++g) {
      const auto at = static_cast<size_t>((g0 + g) * kStripRows + c);
      const float old = strip.steps.scale[at];
      QuantParams& to = params[static_cast<size_t>(g)];
      to = strip.steps.Params(at);
      const double wanted = (static_cast<double>(old) + moves[g]) / static_cast<double>(old);
      if (a(g, g) > 0 && wanted > 0.25 && wanted < 4) {
        to = StretchedQuantParams(input_.spec, to, static_cast<float>(wanted));
      }
      moves[g] = static_cast<double>(to.scale) - static_cast<double>(old);
      furthest = std::max(furthest, std::abs(moves[g]) / static_cast<double>(old));
    }
    if (furthest < kLeastStretch || !(moves.dot(a * moves) - 2 * moves.dot(b) < 0)) return;
    for (int64_t g = 0; g < size; ++g) {
      strip.steps.Set(g0 + g, c, params[static_cast<size_t>(g)]);
    }
    strip.moved = true;
  }

  const MethodInput& input_;
  const StripMatrix& weights_;
  const RefineForm& form_;
  std::vector<int32_t> group_of_;
  // Where group g begins among the features in the form's order, and the end.
  const std::vector<int64_t>& first_;
  std::vector<RefineStrip> strips_;
};

}  // namespace

absl::StatusOr<int32_t> Refine(const MethodInput& input, double lambda, Grid& grid,
                               UnsetVector<uint8_t>& codes, const RunContext& context) {
  const RefineForm form(input.layer.statistics().gram, lambda, GroupedOrder(grid.group_of),
                        *context.executor);
  std::vector<int64_t> first_of_group(static_cast<size_t>(grid.groups) + 1);
  for (const int32_t g : grid.group_of) ++first_of_group[static_cast<size_t>(g) + 1];
  std::partial_sum(first_of_group.begin(), first_of_group.end(), first_of_group.begin());

  const int64_t strips = input.layer.weights().strips();
  const int64_t tile_strips = std::clamp<int64_t>(strips / kWantedTiles, 1, kTileStrips);
  const int64_t tiles = (strips + tile_strips - 1) / tile_strips;
  struct {
    base::Mutex mu;
    int32_t passes ABSL_GUARDED_BY(mu) = 0;
    int64_t tiles_done ABSL_GUARDED_BY(mu) = 0;
  } all;
  context.executor->ParallelFor(tiles, [&](int64_t t) {
    if (context.cancelled()) return;
    RefineTile tile(input, form, grid, first_of_group, t * tile_strips,
                    std::min(tile_strips, strips - t * tile_strips), codes);
    const int32_t taken = tile.Run(context);
    tile.Store(grid, codes);
    const base::MutexLock lock(all.mu);
    all.passes = std::max(all.passes, taken);
    ++all.tiles_done;
    context.Report(Phase::kRound, static_cast<double>(all.tiles_done) / static_cast<double>(tiles));
  });
  if (context.cancelled()) return context.CancellationStatus();
  const base::MutexLock lock(all.mu);
  return all.passes;
}

int64_t RefineBytes(int64_t features) { return RefineForm::BytesFor(features); }

}  // namespace certiq::engine
