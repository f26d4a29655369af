#include "engine/statistics.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
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

void Add(const UpperPanels<double>& other, UpperPanels<double>& sums) {
  for (int64_t i = 0; i < sums.size(); ++i) {
    for (int64_t j = i; j < sums.size(); ++j) sums.at(i, j) += other.at(i, j);
  }
}

UpperPanels<double> PermutePanels(const UpperPanels<double>& from,
                                  const std::vector<int64_t>& order) {
  UpperPanels<double> to(from.size());
  for (int64_t i = 0; i < from.size(); ++i) {
    for (int64_t j = i; j < from.size(); ++j) {
      to.at(i, j) = from.at(std::min(order[i], order[j]), std::max(order[i], order[j]));
    }
  }
  return to;
}

}  // namespace

void Merge(const Statistics& other, Statistics& sums) {
  sums.tokens += other.tokens;
  Add(other.gram, sums.gram);
  if (!other.mismatch.has_value()) return;
  Add(other.mismatch->residual, sums.mismatch->residual);
  for (size_t i = 0; i < sums.mismatch->cross.size(); ++i) {
    sums.mismatch->cross[i] += other.mismatch->cross[i];
  }
}

Statistics Permute(const Statistics& statistics, const std::vector<int64_t>& order) {
  Statistics permuted;
  permuted.tokens = statistics.tokens;
  permuted.gram = PermutePanels(statistics.gram, order);
  if (!statistics.mismatch.has_value()) return permuted;
  MismatchSums& to = permuted.mismatch.emplace();
  to.residual = PermutePanels(statistics.mismatch->residual, order);
  const int64_t n = statistics.features();
  to.cross.resize(statistics.mismatch->cross.size());
  for (int64_t i = 0; i < n; ++i) {
    const double* from = &statistics.mismatch->cross[static_cast<size_t>(order[i] * n)];
    for (int64_t j = 0; j < n; ++j) to.cross[static_cast<size_t>(i * n + j)] = from[order[j]];
  }
  return permuted;
}

StatisticsAccumulator::StatisticsAccumulator(int64_t features, bool mismatched)
    : features_(features) {
  statistics_.gram = UpperPanels<double>(features);
  if (mismatched) {
    MismatchSums& mismatch = statistics_.mismatch.emplace();
    mismatch.residual = UpperPanels<double>(features);
    mismatch.cross.resize(static_cast<size_t>(features * features));
  }
  Allocate();
}

StatisticsAccumulator::StatisticsAccumulator(Statistics sums)
    : features_(sums.features()), statistics_(std::move(sums)) {
  Allocate();
}

void StatisticsAccumulator::Allocate() {
  const auto staged = static_cast<size_t>(Strips(features_) * kBlockRows * kStrip<float>);
  row_.resize(static_cast<size_t>(features_));
  inputs_.values.resize(staged);
  if (!statistics_.mismatch.has_value()) return;
  residual_.values.resize(staged);
  x_row_.resize(row_.size());
}

int64_t StatisticsAccumulator::BytesFor(int64_t features, bool mismatched) {
  const int64_t triangle = UpperPanels<double>::ElementsFor(features) * 8;
  const int64_t staged = Strips(features) * kStrip<float> * (kBlockRows * 4 + 4 + 8);
  return mismatched ? 2 * triangle + features * features * 8 + 2 * staged : triangle + staged;
}

void StatisticsAccumulator::Stage(const float* row, Staged& to) const {
  for (int64_t begin = 0, strip = 0; begin < features_; begin += kStrip<float>, ++strip) {
    std::copy_n(row + begin, std::min<int64_t>(kStrip<float>, features_ - begin),
                to.values.data() + (strip * kBlockRows + staged_rows_) * kStrip<float>);
  }
}

absl::Status StatisticsAccumulator::DecodeRow(DType dtype, const std::byte* bytes,
                                              int64_t first_row, int64_t r, const char* field) {
  const int64_t bad =
      DecodeToFloat(dtype, bytes + r * features_ * ItemSize(dtype), features_, row_.data());
  if (bad < 0) return absl::OkStatus();
  return NonFiniteValue(field, row_[static_cast<size_t>(bad)], first_row + r, bad);
}

absl::Status StatisticsAccumulator::DecodeRowPair(DType x_dtype, const std::byte* x,
                                                  DType x_quantized_dtype,
                                                  const std::byte* x_quantized, int64_t first_row,
                                                  int64_t r, const char* x_field,
                                                  const char* x_quantized_field) {
  if (absl::Status decoded = DecodeRow(x_dtype, x, first_row, r, x_field); !decoded.ok()) {
    return decoded;
  }
  row_.swap(x_row_);
  if (absl::Status decoded =
          DecodeRow(x_quantized_dtype, x_quantized, first_row, r, x_quantized_field);
      !decoded.ok()) {
    return decoded;
  }
  for (size_t j = 0; j < row_.size(); ++j) {
    x_row_[j] -= row_[j];
    if (!std::isfinite(x_row_[j])) {
      return InvalidField(x_field,
                          absl::StrCat("expected x - x_quantized within float32's range, row ",
                                       first_row + r, ", column ", j));
    }
  }
  return absl::OkStatus();
}

absl::Status StatisticsAccumulator::Check(DType dtype, const std::byte* bytes, int64_t first_row,
                                          int64_t rows, const char* field) {
  absl::Status status;
  for (int64_t r = 0; r < rows && status.ok(); ++r) {
    status = DecodeRow(dtype, bytes, first_row, r, field);
  }
  return status;
}

absl::Status StatisticsAccumulator::CheckPair(DType x_dtype, const std::byte* x,
                                              DType x_quantized_dtype, const std::byte* x_quantized,
                                              int64_t first_row, int64_t rows, const char* x_field,
                                              const char* x_quantized_field) {
  absl::Status status;
  for (int64_t r = 0; r < rows && status.ok(); ++r) {
    status = DecodeRowPair(x_dtype, x, x_quantized_dtype, x_quantized, first_row, r, x_field,
                           x_quantized_field);
  }
  return status;
}

absl::Status StatisticsAccumulator::Append(DType dtype, const std::byte* bytes, int64_t first_row,
                                           int64_t rows, const char* field, Executor& executor) {
  for (int64_t r = 0; r < rows; ++r) {
    if (absl::Status decoded = DecodeRow(dtype, bytes, first_row, r, field); !decoded.ok()) {
      return decoded;
    }
    Stage(row_.data(), inputs_);
    ++statistics_.tokens;
    if (++staged_rows_ == kBlockRows) Fold(executor);
  }
  return absl::OkStatus();
}

absl::Status StatisticsAccumulator::AppendPair(DType x_dtype, const std::byte* x,
                                               DType x_quantized_dtype,
                                               const std::byte* x_quantized, int64_t first_row,
                                               int64_t rows, const char* x_field,
                                               const char* x_quantized_field, Executor& executor) {
  for (int64_t r = 0; r < rows; ++r) {
    if (absl::Status decoded = DecodeRowPair(x_dtype, x, x_quantized_dtype, x_quantized, first_row,
                                             r, x_field, x_quantized_field);
        !decoded.ok()) {
      return decoded;
    }
    Stage(row_.data(), inputs_);
    Stage(x_row_.data(), residual_);
    ++statistics_.tokens;
    if (++staged_rows_ == kBlockRows) Fold(executor);
  }
  return absl::OkStatus();
}

void StatisticsAccumulator::ScaleColumns(Staged& staged) const {
  staged.scaled = false;
  staged.scale.assign(static_cast<size_t>(Strips(features_) * kStrip<float>), 1.0);
  for (int64_t strip = 0; strip < Strips(features_); ++strip) {
    float* block = staged.values.data() + strip * kBlockRows * kStrip<float>;
    float largest[kStrip<float>] = {};
    for (int64_t r = 0; r < staged_rows_; ++r) {
      for (int c = 0; c < kStrip<float>; ++c) {
        largest[c] = std::max(largest[c], std::abs(block[r * kStrip<float> + c]));
      }
    }
    for (int c = 0; c < kStrip<float>; ++c) {
      if (largest[c] == 0 || (largest[c] >= kSmallest && largest[c] <= kLargest)) continue;
      const int exponent = std::ilogb(largest[c]);
      for (int64_t r = 0; r < staged_rows_; ++r) {
        float& value = block[r * kStrip<float> + c];
        value = std::ldexp(value, -exponent);
      }
      staged.scale[static_cast<size_t>(strip * kStrip<float> + c)] = std::ldexp(1.0, exponent);
      staged.scaled = true;
    }
  }
}

void StatisticsAccumulator::FoldInto(const Staged& a, const Staged& b, bool upper, double* out,
                                     const UpperPanels<double>& layout, Executor& executor) const {
  // One task a tile of kPanelRows x kPanelRows sums.
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t p = 0; p < layout.panels(); ++p) {
    for (int64_t q = upper ? p : 0; q < layout.panels(); ++q) tiles.emplace_back(p, q);
  }
  const bool scaled = a.scaled || b.scaled;
  executor.ParallelFor(static_cast<int64_t>(tiles.size()), [&](int64_t task) {
    const auto [p, q] = tiles[static_cast<size_t>(task)];
    for (int64_t j = layout.begin(q); j < layout.end(q); j += kStrip<float>) {
      const float* right = b.values.data() + j / kStrip<float> * kBlockRows * kStrip<float>;
      for (int64_t i = layout.begin(p); i < layout.end(p); i += kMicroRows) {
        const float* left =
            a.values.data() + i / kStrip<float> * kBlockRows * kStrip<float> + i % kStrip<float>;
        const int64_t stride = upper ? layout.stride(p) : features_;
        const int64_t at =
            upper ? layout.offset(p) + (i - layout.begin(p)) * stride + (j - layout.begin(p))
                  : i * features_ + j;
        FoldBlock(staged_rows_, left, std::min<int64_t>(kMicroRows, layout.end(p) - i), right,
                  std::min<int64_t>(kStrip<float>, layout.end(q) - j),
                  scaled ? &a.scale[static_cast<size_t>(i)] : nullptr,
                  scaled ? &b.scale[static_cast<size_t>(j)] : nullptr, out + at, stride);
      }
    }
  });
}

void StatisticsAccumulator::Fold(Executor& executor) {
  UpperPanels<double>& gram = statistics_.gram;
  ScaleColumns(inputs_);
  FoldInto(inputs_, inputs_, true, gram.panel(0), gram, executor);
  if (statistics_.mismatch.has_value()) {
    MismatchSums& mismatch = *statistics_.mismatch;
    ScaleColumns(residual_);
    FoldInto(residual_, residual_, true, mismatch.residual.panel(0), gram, executor);
    FoldInto(residual_, inputs_, false, mismatch.cross.data(), gram, executor);
  }
  staged_rows_ = 0;
}

const Statistics& StatisticsAccumulator::Flush(Executor& executor) {
  if (staged_rows_ > 0) Fold(executor);
  return statistics_;
}

Statistics StatisticsAccumulator::Finish(Executor& executor) && {
  Flush(executor);
  return std::move(statistics_);
}

}  // namespace certiq::engine
