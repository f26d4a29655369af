// Rounding of one feature for a strip of rows: codes, levels, errors and sums.
// Included by .cc files of the engine only, like simd.h.

#ifndef CERTIQ_ENGINE_METHODS_ROUND_COLUMN_H_
#define CERTIQ_ENGINE_METHODS_ROUND_COLUMN_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "engine/kernels/aligned.h"
#include "engine/kernels/random.h"
#include "engine/kernels/simd.h"
#include "engine/scales/qparams.h"

namespace certiq::engine {

inline constexpr int64_t kStripRows = kStrip<float>;

// Scales and zero points of a strip's rows, [groups][kStripRows]. Padding rows
// round zeros on a grid of step one.
struct StripGrid {
  std::vector<float> scale;
  std::vector<float> zero;
  // 1 / scale, or NaN where that could leave float32; 0 where the group vanishes: its codes are the
  // zero point.
  std::vector<float> inverse;
  // Whether any group vanishes.
  bool some_vanish = false;
  float lowest;
  float highest;
  DType level_type;

  StripGrid(const Grid& grid, int64_t first_row)
      : scale(static_cast<size_t>(grid.groups * kStripRows), 1.0f),
        zero(scale.size(), static_cast<float>(grid.lowest_code)),
        inverse(scale.size(), 1.0f),
        lowest(static_cast<float>(grid.lowest_code)),
        highest(static_cast<float>(grid.highest_code)),
        level_type(grid.level_type) {
    for (int64_t r = first_row; r < std::min(first_row + kStripRows, grid.rows); ++r) {
      for (int64_t g = 0; g < grid.groups; ++g) {
        const auto from = static_cast<size_t>(r * grid.groups + g);
        Set(g, r - first_row, grid.Params(from));
      }
    }
  }

  void Set(int64_t group, int64_t lane, QuantParams params) {
    const auto to = static_cast<size_t>(group * kStripRows + lane);
    scale[to] = params.scale;
    zero[to] = static_cast<float>(params.zero);
    const bool moderate = params.scale > 0x1p-100f && params.scale < 0x1p100f;
    inverse[to] = moderate ? 1 / params.scale : std::numeric_limits<float>::quiet_NaN();
    if (!params.vanishes) return;
    inverse[to] = 0;
    some_vanish = true;
  }

  bool Vanishes(int64_t group, int64_t lane) const {
    return inverse[static_cast<size_t>(group * kStripRows + lane)] == 0;
  }

  QuantParams Params(size_t at) const {
    return {scale[at], static_cast<int32_t>(zero[at]), inverse[at] == 0};
  }

  // Sets the codes of groups that vanish, whatever their targets: feedback may have moved these.
  void ZeroVanished(int64_t group, float* code) const {
    if (!some_vanish) return;
    for (int64_t c = 0; c < kStripRows; ++c) {
      if (Vanishes(group, c)) code[c] = zero[static_cast<size_t>(group * kStripRows + c)];
    }
  }
};

// What rounding leaves behind, per row of the strip; see RoundedLayer.
struct StripSums {
  double damped[kStripRows] = {};
  double bound[kStripRows] = {};
  double widest[kStripRows] = {};
  double clipped_reach[kStripRows] = {};
  int32_t clipped[kStripRows] = {};
  float overshoot[kStripRows] = {};
};

// NaN becomes the lowest code; the error then says so.
inline float ClampCode(float code, float lowest, float highest) {
  const float above = code > lowest ? code : lowest;
  return above < highest ? above : highest;
}

// Codes by nearest rounding in float32, exact unless a quotient is so close to a tie, or to the
// limits of float32, that float64 has to decide: then false. A product with the inverse is
// off by at most 2^-23 of itself; where it passes every grid by far that does not matter.
inline bool EasyCodes(const StripGrid& grid, int64_t group, const float* v, float* code) {
  const float* inverse = grid.inverse.data() + group * kStripRows;
  const float* zero = grid.zero.data() + group * kStripRows;
  int32_t hard = 0;
  for (int64_t c = 0; c < kStripRows; ++c) {
    const float quotient = v[c] * inverse[c];
    const float nearest = std::nearbyint(quotient);
    const float size = std::abs(quotient);
    const bool clear = std::abs(quotient - nearest) <= 0.5f - 0x1p-21f * size;
    const bool far = size >= 1024.0f;
    hard |= (clear ? 0 : 1) & (far ? 0 : 1);
    code[c] = ClampCode(nearest + zero[c], grid.lowest, grid.highest);
  }
  return hard == 0;
}

// Codes by nearest rounding, where no group vanishes.
inline void NearestLevels(const StripGrid& grid, int64_t group, const float* v, float* code) {
  const float* scale = grid.scale.data() + group * kStripRows;
  const float* zero = grid.zero.data() + group * kStripRows;
  if (!EasyCodes(grid, group, v, code)) {
    for (int64_t c = 0; c < kStripRows; ++c) {
      code[c] = ClampCode(FreeCode(v[c], scale[c], zero[c]), grid.lowest, grid.highest);
    }
  }
  if (grid.level_type == DType::kF32) return;
  for (int64_t c = 0; c < kStripRows; ++c) {
    const auto distance = [&](float candidate) {
      return std::abs(v[c] - RoundTo(grid.level_type, scale[c] * (candidate - zero[c])));
    };
    const float middle = code[c];
    for (const float candidate : {middle - 1, middle + 1}) {
      if (candidate < grid.lowest || candidate > grid.highest) continue;
      if (distance(candidate) < distance(code[c])) code[c] = candidate;
    }
  }
}

// Codes by nearest rounding. Where levels are rounded to a half type they are
// no longer evenly spaced: the neighbours of the nearest even code are tried too.
inline void NearestCodes(const StripGrid& grid, int64_t group, const float* v, float* code) {
  NearestLevels(grid, group, v, code);
  grid.ZeroVanished(group, code);
}

// Codes of feature j that are given, row-major [rows, features].
inline void LoadCodes(const UnsetVector<uint8_t>& codes, int64_t features, int64_t first_row,
                      int64_t j, const StripGrid& grid, float* code) {
  const int64_t rows = static_cast<int64_t>(codes.size()) / features;
  const int64_t live = std::min(kStripRows, rows - first_row);
  const uint8_t* from = codes.data() + first_row * features + j;
  for (int64_t c = 0; c < live; ++c) code[c] = from[c * features];
  // Padding is zeros on a grid of step one.
  for (int64_t c = live; c < kStripRows; ++c) code[c] = grid.zero[static_cast<size_t>(c)];
}

// Codes by unbiased stochastic rounding, as if every level were a multiple of the scale.
inline void StochasticCodes(const StripGrid& grid, int64_t group, const float* v, uint64_t seed,
                            int64_t first_row, int64_t column, float* code) {
  const float* scale = grid.scale.data() + group * kStripRows;
  const float* zero = grid.zero.data() + group * kStripRows;
  for (int64_t c = 0; c < kStripRows; ++c) {
    const double position = static_cast<double>(v[c]) / static_cast<double>(scale[c]);
    const double below = std::floor(position);
    const bool up = static_cast<double>(UniformAt(seed, first_row + c, column)) < position - below;
    code[c] =
        ClampCode(static_cast<float>(below + (up ? 1 : 0)) + zero[c], grid.lowest, grid.highest);
  }
  grid.ZeroVanished(group, code);
}

// Levels of codes, errors v - q, and the sums. `d` is D_j, 0 for a dead feature.
inline void AddRounded(const StripGrid& grid, int64_t group, Rounding rounding, double d,
                       const float* v, const float* code, float* level, StripSums& sums) {
  const float* scale = grid.scale.data() + group * kStripRows;
  const float* zero = grid.zero.data() + group * kStripRows;
  float error[kStripRows];
  float widest[kStripRows];
  for (int64_t c = 0; c < kStripRows; ++c) level[c] = scale[c] * (code[c] - zero[c]);
  if (grid.level_type != DType::kF32) {
    for (int64_t c = 0; c < kStripRows; ++c) level[c] = RoundTo(grid.level_type, level[c]);
  }
  for (int64_t c = 0; c < kStripRows; ++c) {
    const float e = v[c] - level[c];
    const float half = 0.5f * scale[c];
    const float magnitude = std::abs(e);
    error[c] = e;
    // v is a float32 sum: 2^-22 |v| covers its own rounding.
    widest[c] = std::max(half, magnitude) + 0x1p-22f * std::abs(v[c]);
  }
  for (int64_t c = 0; c < kStripRows; ++c) {
    const double e = error[c];
    sums.damped[c] += d * (e * e);
  }
  for (int64_t c = 0; c < kStripRows; ++c) {
    const double e = widest[c];
    sums.bound[c] += d * (e * e);
  }
  if (rounding == Rounding::kNearest) {
    // Few clip.
    int32_t outside = 0;
    for (int64_t c = 0; c < kStripRows; ++c) {
      outside |= std::abs(error[c]) > 0.5f * scale[c] ? 1 : 0;
    }
    if (outside == 0) return;
    for (int64_t c = 0; c < kStripRows; ++c) {
      const float steps = std::abs(error[c]) / scale[c];
      // Codes that are given, and levels of half types, may be far from a target inside the grid.
      const bool outermost = error[c] > 0 ? code[c] >= grid.highest : code[c] <= grid.lowest;
      const bool clips = outermost && steps > 0.5f * (1 + 1e-6f);
      sums.clipped[c] += clips ? 1 : 0;
      sums.overshoot[c] = std::max(sums.overshoot[c], clips ? steps - 0.5f : 0.0f);
    }
    return;
  }
  const double root = std::sqrt(d);
  for (int64_t c = 0; c < kStripRows; ++c) {
    const double reach = static_cast<double>(std::abs(error[c])) * root;
    if (grid.Vanishes(group, c)) {
      // Nothing is drawn, and nothing has an edge.
      sums.clipped_reach[c] += reach;
      continue;
    }
    const float position = v[c] / scale[c] + zero[c];
    const float beyond = std::max(grid.lowest - position, position - grid.highest);
    // Inside the outermost levels rounding is unbiased; a target on one is exact.
    if (beyond > 1e-6f) {
      sums.clipped[c] += 1;
      sums.overshoot[c] = std::max(sums.overshoot[c], beyond);
      sums.clipped_reach[c] += reach;
    } else {
      const double step = scale[c];
      sums.widest[c] = std::max(sums.widest[c], d * step * step);
    }
  }
}

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_ROUND_COLUMN_H_
