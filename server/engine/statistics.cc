#include "engine/statistics.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/simd.h"
#include "engine/status.h"

namespace certiq::engine {
namespace {

// Squares of magnitudes inside [2^-40, 2^40] and sums of 256 of them are far
// from the ends of float32's range (2^-126, 2^128).
constexpr float kSmallest = 0x1p-40f;
constexpr float kLargest = 0x1p40f;

int64_t Strips(int64_t features) { return (features + kStrip<float> - 1) / kStrip<float>; }

// out[i][j] += sum over staged rows of a_i b_j for one strip of columns j,
// kMicroRows columns i. `scale` is null or per column.
void FoldBlock(int64_t depth, const float* a, int64_t live_rows, const float* b, int64_t live_cols,
               const double* scale_a, const double* scale_b, double* out, int64_t out_stride) {
  for (int64_t k0 = 0; k0 < depth; k0 += StatisticsAccumulator::kChainRows) {
    Accumulator<float> sum = {};
    MultiplyStrip(std::min(StatisticsAccumulator::kChainRows, depth - k0), a + k0 * kStrip<float>,
                  kStrip<float>, 1, b + k0 * kStrip<float>, sum);
    for (int64_t r = 0; r < live_rows; ++r) {
      double* row = out + r * out_stride;
      if (scale_a == nullptr && live_cols == kStrip<float>) {
        for (int half = 0; half < 2; ++half) {
          for (int lane = 0; lane < kLanes<float>; ++lane) {
            row[half * kLanes<float> + lane] += static_cast<double>(sum.row[r][half][lane]);
          }
        }
        continue;
      }
      for (int64_t c = 0; c < live_cols; ++c) {
        const double factor = scale_a == nullptr ? 1.0 : scale_a[r] * scale_b[c];
        row[c] += factor * static_cast<double>(sum.row[r][c / kLanes<float>][c % kLanes<float>]);
      }
    }
  }
}

}  // namespace

StatisticsAccumulator::StatisticsAccumulator(int64_t features)
    : features_(features),
      staged_(static_cast<size_t>(Strips(features) * kBlockRows * kStrip<float>)),
      row_(static_cast<size_t>(features)) {
  statistics_.gram = UpperPanels<double>(features);
}

int64_t StatisticsAccumulator::BytesFor(int64_t features) {
  return UpperPanels<double>::ElementsFor(features) * 8 +
         Strips(features) * kStrip<float> * (kBlockRows * 4 + 4 + 8);
}

void StatisticsAccumulator::Stage(const float* row) {
  for (int64_t begin = 0, strip = 0; begin < features_; begin += kStrip<float>, ++strip) {
    float* to = staged_.data() + (strip * kBlockRows + staged_rows_) * kStrip<float>;
    std::copy_n(row + begin, std::min<int64_t>(kStrip<float>, features_ - begin), to);
  }
  ++staged_rows_;
}

absl::Status StatisticsAccumulator::Append(DType dtype, const std::byte* bytes, int64_t rows,
                                           const char* field, Executor& executor) {
  const int64_t row_bytes = features_ * ItemSize(dtype);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t bad = DecodeToFloat(dtype, bytes + r * row_bytes, features_, row_.data());
    if (bad >= 0) {
      return NonFiniteValue(field, row_[static_cast<size_t>(bad)], statistics_.tokens, bad);
    }
    Stage(row_.data());
    ++statistics_.tokens;
    if (staged_rows_ == kBlockRows) Fold(executor);
  }
  return absl::OkStatus();
}

bool StatisticsAccumulator::ScaleColumns() {
  bool scaled = false;
  scale_.assign(static_cast<size_t>(Strips(features_) * kStrip<float>), 1.0);
  for (int64_t strip = 0; strip < Strips(features_); ++strip) {
    float* block = staged_.data() + strip * kBlockRows * kStrip<float>;
    float largest[kStrip<float>] = {};
    for (int64_t r = 0; r < staged_rows_; ++r) {
      for (int c = 0; c < kStrip<float>; ++c) {
        largest[c] = std::max(largest[c], std::abs(block[r * kStrip<float> + c]));
      }
    }
    for (int c = 0; c < kStrip<float>; ++c) {
      if (largest[c] == 0 || (largest[c] >= kSmallest && largest[c] <= kLargest)) continue;
      // Two steps, since 2^-exponent itself may be beyond float32.
      const int exponent = std::ilogb(largest[c]);
      for (int64_t r = 0; r < staged_rows_; ++r) {
        block[r * kStrip<float> + c] = std::ldexp(block[r * kStrip<float> + c], -exponent);
      }
      scale_[static_cast<size_t>(strip * kStrip<float> + c)] = std::ldexp(1.0, exponent);
      scaled = true;
    }
  }
  return scaled;
}

void StatisticsAccumulator::Fold(Executor& executor) {
  const bool scaled = ScaleColumns();
  UpperPanels<double>& gram = statistics_.gram;
  const int64_t panels = gram.panels();
  const int64_t depth = staged_rows_;
  // One task a tile (p, q), p <= q, of kPanelRows x kPanelRows sums.
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t q = p; q < panels; ++q) tiles.emplace_back(p, q);
  }
  executor.ParallelFor(static_cast<int64_t>(tiles.size()), [&](int64_t task) {
    const auto [p, q] = tiles[static_cast<size_t>(task)];
    for (int64_t j = gram.begin(q); j < gram.end(q); j += kStrip<float>) {
      const float* b = staged_.data() + j / kStrip<float> * kBlockRows * kStrip<float>;
      for (int64_t i = gram.begin(p); i < gram.end(p); i += kMicroRows) {
        const float* a =
            staged_.data() + i / kStrip<float> * kBlockRows * kStrip<float> + i % kStrip<float>;
        FoldBlock(depth, a, std::min<int64_t>(kMicroRows, gram.end(p) - i), b,
                  std::min<int64_t>(kStrip<float>, gram.end(q) - j), scaled ? &scale_[i] : nullptr,
                  scaled ? &scale_[j] : nullptr,
                  gram.panel(p) + (i - gram.begin(p)) * gram.stride(p) + (j - gram.begin(p)),
                  gram.stride(p));
      }
    }
  });
  staged_rows_ = 0;
}

Statistics StatisticsAccumulator::Finish(Executor& executor) && {
  if (staged_rows_ > 0) Fold(executor);
  return std::move(statistics_);
}

}  // namespace certiq::engine
