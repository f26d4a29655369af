#include "engine/gram/gram.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "engine/gram/gram_kernel.h"
#include "engine/kernels/simd.h"

namespace certiq::engine {
namespace {

// Squares of magnitudes inside [2^-40, 2^40] and sums of kFoldRows of them are far
// from the ends of float32's range (2^-126, 2^128).
constexpr float kSmallest = 0x1p-40f;
constexpr float kLargest = 0x1p40f;

static_assert(StatisticsAccumulator::kBlockRows % kFoldRows == 0);

// Blocks of fewer rows have no median worth the name.
constexpr int64_t kLeastOrdinary = 8;

int64_t Strips(int64_t features) { return (features + kStrip<float> - 1) / kStrip<float>; }

// Some strips are staged at a time, row by row: what is read is long enough to be fetched ahead by
// the hardware, and there are few enough places to write to.
constexpr int64_t kStripsAtOnce = 16;
int64_t StagedPieces(int64_t features) {
  return (Strips(features) + kStripsAtOnce - 1) / kStripsAtOnce;
}

// Runs body(begin, end) over [0, count) in pieces worth a thread each: `cost` elements an item.
void InPieces(int64_t count, int64_t cost, Executor& executor,
              const std::function<void(int64_t, int64_t)>& body) {
  constexpr int64_t kWorthwhile = 1 << 15;
  const int64_t piece = std::max<int64_t>(1, kWorthwhile / std::max<int64_t>(1, cost));
  executor.ParallelFor((count + piece - 1) / piece, [&](int64_t task) {
    body(task * piece, std::min(count, (task + 1) * piece));
  });
}

const std::byte* At(const TokenRows& rows, int64_t features, int64_t row, int64_t column) {
  return rows.bytes + (row * features + column) * ItemSize(rows.dtype);
}

absl::Status CheckValues(const TokenRows& x, int64_t features, int64_t first_row, int64_t rows) {
  const int64_t bad = FindNonFinite(x.dtype, x.bytes, rows * features);
  if (bad < 0) return absl::OkStatus();
  float value = 0;
  DecodeToFloat(x.dtype, x.bytes + bad * ItemSize(x.dtype), 1, &value);
  return base::NonFiniteValue(x.field, value, first_row + bad / features, bad % features);
}

void Add(const UpperTriangle<double>& other, UpperTriangle<double>& sums) {
  for (int64_t i = 0; i < sums.size(); ++i) {
    double* to = sums.row(i);
    const double* from = other.row(i);
    for (int64_t j = 0; j < sums.size() - i; ++j) to[j] += from[j];
  }
}

// Massive squares of other sums, where either side has some.
void AddSquares(const std::vector<double>& other, std::vector<double>& squares) {
  if (other.empty()) return;
  squares.resize(other.size());
  for (size_t j = 0; j < other.size(); ++j) squares[j] += other[j];
}

std::vector<double> PermuteSquares(const std::vector<double>& squares,
                                   const std::vector<int64_t>& order) {
  std::vector<double> permuted(squares.size());
  for (size_t i = 0; i < permuted.size(); ++i) permuted[i] = squares[static_cast<size_t>(order[i])];
  return permuted;
}

// out[i][j] += sum over rows of a_i b_j, in float64, for columns [i0, i1) of a and [j0, j1) of b,
// both [rows][features]; where `upper`, j >= i only. `out` is element (i0, j0). Products are exact.
void AddWide(const std::vector<float>& a, const std::vector<float>& b, int64_t features, bool upper,
             int64_t i0, int64_t i1, int64_t j0, int64_t j1, double* out, int64_t stride) {
  // Rows that are added at once, so that sums are read and written once for several.
  constexpr int64_t kAtOnce = 4;
  const int64_t rows = static_cast<int64_t>(a.size()) / features;
  std::vector<double> right(static_cast<size_t>(kAtOnce * (j1 - j0)));
  for (int64_t first = 0; first < rows; first += kAtOnce) {
    const int64_t live = std::min(kAtOnce, rows - first);
    for (int64_t k = 0; k < kAtOnce; ++k) {
      for (int64_t j = j0; j < j1; ++j) {
        const auto at = static_cast<size_t>((first + k) * features + j);
        right[static_cast<size_t>(k * (j1 - j0) + j - j0)] =
            k < live ? static_cast<double>(b[at]) : 0;
      }
    }
    const double* r0 = right.data();
    const double* r1 = r0 + (j1 - j0);
    const double* r2 = r1 + (j1 - j0);
    const double* r3 = r2 + (j1 - j0);
    for (int64_t i = i0; i < i1; ++i) {
      double left[kAtOnce] = {};
      for (int64_t k = 0; k < live; ++k) {
        left[k] = a[static_cast<size_t>((first + k) * features + i)];
      }
      double* row = out + (i - i0) * stride;
      for (int64_t j = upper ? std::max<int64_t>(0, i - j0) : 0; j < j1 - j0; ++j) {
        row[j] += left[0] * r0[j] + left[1] * r1[j] + left[2] * r2[j] + left[3] * r3[j];
      }
    }
  }
}

// Sixteen features at a time, so that lines of the triangle are read whole, two by two: once along
// their rows, once down their columns. What is gathered then lies in a row that caches hold.
UpperTriangle<double> PermutePanels(const UpperTriangle<double>& from,
                                    const std::vector<int64_t>& order, Executor& executor) {
  constexpr int64_t kFeatures = 16;
  const int64_t n = from.size();
  std::vector<int64_t> place(order.size());
  for (int64_t i = 0; i < n; ++i) place[static_cast<size_t>(order[i])] = i;
  auto to = UpperTriangle<double>::Unset(n);
  executor.ParallelFor((n + kFeatures - 1) / kFeatures, [&](int64_t at) {
    const int64_t first = at * kFeatures;
    const int64_t live = std::min(kFeatures, n - first);
    std::vector<double> whole(static_cast<size_t>(live * n));
    for (int64_t i = 0; i < first; ++i) {
      const double* column = &from.at(i, first);
      for (int64_t k = 0; k < live; ++k) whole[static_cast<size_t>(k * n + i)] = column[k];
    }
    for (int64_t k = 0; k < live; ++k) {
      double* row = &whole[static_cast<size_t>(k * n)];
      for (int64_t i = first; i < first + k; ++i) row[i] = from.at(i, first + k);
      std::copy_n(from.row(first + k), n - first - k, row + first + k);
      const int64_t i = place[static_cast<size_t>(first + k)];
      double* permuted = to.row(i);
      for (int64_t j = i; j < n; ++j) permuted[j - i] = row[order[j]];
    }
  });
  return to;
}

}  // namespace

void Merge(const Statistics& other, Statistics& sums) {
  sums.tokens += other.tokens;
  Add(other.gram, sums.gram);
  AddSquares(other.massive_squares, sums.massive_squares);
  if (!other.mismatch.has_value()) return;
  Add(other.mismatch->residual, sums.mismatch->residual);
  AddSquares(other.mismatch->massive_squares, sums.mismatch->massive_squares);
  for (size_t i = 0; i < sums.mismatch->cross.size(); ++i) {
    sums.mismatch->cross[i] += other.mismatch->cross[i];
  }
}

Statistics Sum(const Statistics& a, const Statistics& b, Executor& executor) {
  const auto add = [&](const UpperTriangle<double>& left, const UpperTriangle<double>& right) {
    auto sums = UpperTriangle<double>::Unset(left.size());
    executor.ParallelFor(sums.panels(), [&](int64_t p) {
      for (int64_t i = sums.begin(p); i < sums.end(p); ++i) {
        const double* x = left.row(i);
        const double* y = right.row(i);
        double* to = sums.row(i);
        for (int64_t j = 0; j < sums.size() - i; ++j) to[j] = x[j] + y[j];
      }
    });
    return sums;
  };
  Statistics sum;
  sum.tokens = a.tokens + b.tokens;
  sum.gram = add(a.gram, b.gram);
  sum.massive_squares = a.massive_squares;
  AddSquares(b.massive_squares, sum.massive_squares);
  if (!a.mismatch.has_value()) return sum;
  MismatchSums& mismatch = sum.mismatch.emplace();
  mismatch.residual = add(a.mismatch->residual, b.mismatch->residual);
  mismatch.massive_squares = a.mismatch->massive_squares;
  AddSquares(b.mismatch->massive_squares, mismatch.massive_squares);
  mismatch.cross = a.mismatch->cross;
  for (size_t i = 0; i < mismatch.cross.size(); ++i) mismatch.cross[i] += b.mismatch->cross[i];
  return sum;
}

Statistics Permute(const Statistics& statistics, const std::vector<int64_t>& order,
                   Executor& executor) {
  Statistics permuted;
  permuted.tokens = statistics.tokens;
  permuted.gram = PermutePanels(statistics.gram, order, executor);
  permuted.massive_squares = PermuteSquares(statistics.massive_squares, order);
  if (!statistics.mismatch.has_value()) return permuted;
  MismatchSums& to = permuted.mismatch.emplace();
  to.residual = PermutePanels(statistics.mismatch->residual, order, executor);
  to.massive_squares = PermuteSquares(statistics.mismatch->massive_squares, order);
  const int64_t n = statistics.features();
  to.cross.resize(statistics.mismatch->cross.size());
  InPieces(n, n, executor, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double* from = &statistics.mismatch->cross[static_cast<size_t>(order[i] * n)];
      for (int64_t j = 0; j < n; ++j) to.cross[static_cast<size_t>(i * n + j)] = from[order[j]];
    }
  });
  return permuted;
}

StatisticsAccumulator::StatisticsAccumulator(int64_t features, bool mismatched)
    : features_(features) {
  statistics_.gram = UpperTriangle<double>(features);
  if (mismatched) {
    MismatchSums& mismatch = statistics_.mismatch.emplace();
    mismatch.residual = UpperTriangle<double>(features);
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
  inputs_.values.resize(staged);
  largest_.resize(static_cast<size_t>(StagedPieces(features_) * kBlockRows));
  if (statistics_.mismatch.has_value()) residual_.values.resize(staged);
}

int64_t StatisticsAccumulator::BytesFor(int64_t features, bool mismatched) {
  const int64_t triangle = UpperTriangle<double>::ElementsFor(features) * 8;
  // Rows in float64, at most half of them, and the largest values of all.
  const int64_t wide = features * 4 * kBlockRows / 2;
  const int64_t staged = Strips(features) * kStrip<float> * (kBlockRows * 4 + 8) + wide +
                         StagedPieces(features) * kBlockRows * 4;
  return mismatched ? 2 * triangle + features * features * 8 + 2 * staged : triangle + staged;
}

bool StatisticsAccumulator::Stage(const TokenRows& x, const TokenRows* x_quantized, int64_t row,
                                  int64_t rows, Executor& executor) {
  const TokenRows& inputs = x_quantized == nullptr ? x : *x_quantized;
  // Binary16 ends at 2^16 and its steps are 2^-24: so are those of differences.
  wide_range_ |= x.dtype != DType::kF16 || inputs.dtype != DType::kF16;
  std::atomic<bool> finite{true};
  executor.ParallelFor(StagedPieces(features_), [&](int64_t piece) {
    const int64_t begin = piece * kStripsAtOnce;
    const int64_t end = std::min(begin + kStripsAtOnce, Strips(features_));
    bool good = true;
    for (int64_t r = 0; r < rows; ++r) {
      alignas(kVectorBytes) float largest[kStrip<float>] = {};
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t column = strip * kStrip<float>;
        const int64_t live = std::min<int64_t>(kStrip<float>, features_ - column);
        const int64_t to = (strip * kBlockRows + staged_rows_ + r) * kStrip<float>;
        float* values = inputs_.values.data() + to;
        good &=
            DecodeToFloat(inputs.dtype, At(inputs, features_, row + r, column), live, values) < 0;
        for (int64_t c = 0; c < live; ++c) largest[c] = std::max(largest[c], std::abs(values[c]));
        if (x_quantized == nullptr) continue;
        float* residual = residual_.values.data() + to;
        good &= DecodeToFloat(x.dtype, At(x, features_, row + r, column), live, residual) < 0;
        for (int64_t c = 0; c < live; ++c) {
          residual[c] -= values[c];
          good &= std::isfinite(residual[c]);
          largest[c] = std::max(largest[c], std::abs(residual[c]));
        }
      }
      for (int64_t half = kStrip<float> / 2; half > 0; half /= 2) {
        for (int64_t c = 0; c < half; ++c) largest[c] = std::max(largest[c], largest[c + half]);
      }
      largest_[static_cast<size_t>(piece * kBlockRows + staged_rows_ + r)] = largest[0];
    }
    if (!good) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load(std::memory_order_relaxed);
}

absl::Status StatisticsAccumulator::Check(const TokenRows& x, int64_t features, int64_t first_row,
                                          int64_t rows) {
  return CheckValues(x, features, first_row, rows);
}

absl::Status StatisticsAccumulator::CheckPair(const TokenRows& x, const TokenRows& x_quantized,
                                              int64_t features, int64_t first_row, int64_t rows) {
  for (const TokenRows* each : {&x, &x_quantized}) {
    RETURN_IF_ERROR(CheckValues(*each, features, first_row, rows));
  }
  // The difference of two binary16 is far inside float32.
  if (x.dtype == DType::kF16 && x_quantized.dtype == DType::kF16) return absl::OkStatus();
  std::vector<float> values(static_cast<size_t>(features));
  std::vector<float> others(values.size());
  for (int64_t r = 0; r < rows; ++r) {
    DecodeToFloat(x.dtype, At(x, features, r, 0), features, values.data());
    DecodeToFloat(x_quantized.dtype, At(x_quantized, features, r, 0), features, others.data());
    for (size_t j = 0; j < values.size(); ++j) {
      if (std::isfinite(values[j] - others[j])) continue;
      return base::InvalidField(
          x.field, absl::StrCat("expected x - x_quantized within float32's range, row ",
                                first_row + r, ", column ", j));
    }
  }
  return absl::OkStatus();
}

absl::Status StatisticsAccumulator::Append(const TokenRows& x, int64_t first_row, int64_t rows,
                                           Executor& executor) {
  return AppendRows(x, nullptr, first_row, rows, executor);
}

absl::Status StatisticsAccumulator::AppendPair(const TokenRows& x, const TokenRows& x_quantized,
                                               int64_t first_row, int64_t rows,
                                               Executor& executor) {
  return AppendRows(x, &x_quantized, first_row, rows, executor);
}

absl::Status StatisticsAccumulator::AppendRows(const TokenRows& x, const TokenRows* x_quantized,
                                               int64_t first_row, int64_t rows,
                                               Executor& executor) {
  for (int64_t row = 0; row < rows;) {
    const int64_t piece = std::min(rows - row, kBlockRows - staged_rows_);
    if (!Stage(x, x_quantized, row, piece, executor)) {
      // Which value it was is looked for only now.
      absl::Status bad = x_quantized == nullptr
                             ? Check(x, features_, first_row, rows)
                             : CheckPair(x, *x_quantized, features_, first_row, rows);
      return bad.ok() ? absl::InternalError("a value that is not finite came and went") : bad;
    }
    statistics_.tokens += piece;
    staged_rows_ += piece;
    row += piece;
    if (staged_rows_ == kBlockRows) Fold(executor);
  }
  return absl::OkStatus();
}

StatisticsAccumulator::WideRows StatisticsAccumulator::FindWideRows() {
  std::vector<float> largest(largest_.begin(), largest_.begin() + staged_rows_);
  for (int64_t piece = 1; piece < StagedPieces(features_); ++piece) {
    const float* of_piece = largest_.data() + piece * kBlockRows;
    for (size_t r = 0; r < largest.size(); ++r) largest[r] = std::max(largest[r], of_piece[r]);
  }
  // Rows of zeros, such as padding, say nothing of what is ordinary.
  std::vector<float> sorted = largest;
  std::erase(sorted, 0.0f);
  WideRows wide;
  if (sorted.empty()) return wide;
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>((sorted.size() - 1) / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  const bool all = staged_rows_ < kLeastOrdinary;
  if (!all || ordinary_ == 0) ordinary_ = *middle;
  const float massive = kMassive * ordinary_;
  const float limit = all ? 0 : massive;
  for (int64_t r = 0; r < staged_rows_; ++r) {
    const float size = largest[static_cast<size_t>(r)];
    if (size <= limit) continue;
    wide.rows.push_back(r);
    wide.massive.push_back(size > massive);
  }
  return wide;
}

void StatisticsAccumulator::TakeOut(const WideRows& wide, Staged& staged,
                                    std::vector<double>& squares) const {
  staged.wide.clear();
  for (size_t i = 0; i < wide.rows.size(); ++i) {
    if (wide.massive[i]) squares.resize(static_cast<size_t>(features_));
    for (int64_t j = 0; j < features_; ++j) {
      float& value = staged.values[static_cast<size_t>(
          (j / kStrip<float> * kBlockRows + wide.rows[i]) * kStrip<float> + j % kStrip<float>)];
      const float exact = std::exchange(value, 0.0f);
      staged.wide.push_back(exact);
      if (!wide.massive[i]) continue;
      squares[static_cast<size_t>(j)] += static_cast<double>(exact) * static_cast<double>(exact);
    }
  }
}

void StatisticsAccumulator::ScaleColumns(Staged& staged, Executor& executor) const {
  staged.scaled = false;
  if (!wide_range_) return;
  std::atomic<bool> scaled{false};
  staged.scale.assign(static_cast<size_t>(Strips(features_) * kStrip<float>), 1.0);
  InPieces(Strips(features_), staged_rows_ * kStrip<float>, executor,
           [&](int64_t begin, int64_t end) {
             for (int64_t strip = begin; strip < end; ++strip) {
               float* block = staged.values.data() + strip * kBlockRows * kStrip<float>;
               float largest[kStrip<float>] = {};
               for (int64_t r = 0; r < staged_rows_; ++r) {
                 for (int c = 0; c < kStrip<float>; ++c) {
                   largest[c] = std::max(largest[c], std::abs(block[r * kStrip<float> + c]));
                 }
               }
               for (int c = 0; c < kStrip<float>; ++c) {
                 if (largest[c] == 0 || (largest[c] >= kSmallest && largest[c] <= kLargest))
                   continue;
                 const int exponent = std::ilogb(largest[c]);
                 for (int64_t r = 0; r < staged_rows_; ++r) {
                   float& value = block[r * kStrip<float> + c];
                   value = std::ldexp(value, -exponent);
                 }
                 staged.scale[static_cast<size_t>(strip * kStrip<float> + c)] =
                     std::ldexp(1.0, exponent);
                 scaled.store(true, std::memory_order_relaxed);
               }
             }
           });
  staged.scaled = scaled.load(std::memory_order_relaxed);
}

void StatisticsAccumulator::FoldInto(const Staged& a, const Staged& b, bool upper, double* out,
                                     const UpperTriangle<double>& layout,
                                     Executor& executor) const {
  // One task a tile of kPanelRows x kPanelRows sums: 128 KiB of float64, which stay in a second
  // level cache beside two tiles of kFoldRows staged float32 rows, 96 KiB each. Of these a strip
  // (24 KiB with AVX-512) stays in the first level while the columns of the other pass.
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t p = 0; p < layout.panels(); ++p) {
    for (int64_t q = upper ? p : 0; q < layout.panels(); ++q) tiles.emplace_back(p, q);
  }
  const bool scaled = a.scaled || b.scaled;
  const auto strip_of = [](const Staged& from, int64_t column, int64_t row) {
    return from.values.data() + (column / kStrip<float> * kBlockRows + row) * kStrip<float>;
  };
  executor.ParallelFor(static_cast<int64_t>(tiles.size()), [&](int64_t task) {
    const auto [p, q] = tiles[static_cast<size_t>(task)];
    const int64_t stride = upper ? layout.stride(p) : features_;
    for (int64_t k = 0; k < staged_rows_; k += kFoldRows) {
      const int64_t rows = std::min(kFoldRows, staged_rows_ - k);
      for (int64_t j = layout.begin(q); j < layout.end(q); j += kStrip<float>) {
        const int64_t live_cols = std::min<int64_t>(kStrip<float>, layout.end(q) - j);
        const float* right = strip_of(b, j, k);
        // The strip after this one comes from the third level while this one is worked on, a part
        // beside each micro tile.
        const bool more = j + kStrip<float> < layout.end(q);
        const float* next = more ? strip_of(b, j + kStrip<float>, k)
                                 : strip_of(b, layout.begin(q), (k + rows) % kBlockRows);
        const char* ahead = reinterpret_cast<const char*>(next);
        constexpr int64_t kPart = kFoldRows * kStrip<float> * 4 / (kPanelRows / kMicroRows);
        for (int64_t i = layout.begin(p); i < layout.end(p); i += kMicroRows) {
          // What lies below the diagonal is not kept.
          if (upper && i >= j + live_cols) break;
          for (int64_t line = 0; line < kPart; line += kLineBytes) {
            __builtin_prefetch(ahead + line, 0, 2);
          }
          ahead += kPart;
          const int64_t at =
              upper ? layout.offset(p) + (i - layout.begin(p)) * stride + (j - layout.begin(p))
                    : i * features_ + j;
          AddGramBlock(rows, strip_of(a, i, k) + i % kStrip<float>,
                       std::min<int64_t>(kMicroRows, layout.end(p) - i), right, live_cols,
                       scaled ? &a.scale[static_cast<size_t>(i)] : nullptr,
                       scaled ? &b.scale[static_cast<size_t>(j)] : nullptr, out + at, stride);
        }
      }
    }
    const int64_t i = layout.begin(p);
    const int64_t j = layout.begin(q);
    AddWide(a.wide, b.wide, features_, upper && p == q, i, layout.end(p), j, layout.end(q),
            out + (upper ? layout.offset(p) + j - i : i * features_ + j), stride);
  });
}

void StatisticsAccumulator::Fold(Executor& executor) {
  UpperTriangle<double>& gram = statistics_.gram;
  const WideRows wide = FindWideRows();
  TakeOut(wide, inputs_, statistics_.massive_squares);
  ScaleColumns(inputs_, executor);
  FoldInto(inputs_, inputs_, true, gram.panel(0), gram, executor);
  if (statistics_.mismatch.has_value()) {
    MismatchSums& mismatch = *statistics_.mismatch;
    TakeOut(wide, residual_, mismatch.massive_squares);
    ScaleColumns(residual_, executor);
    FoldInto(residual_, residual_, true, mismatch.residual.panel(0), gram, executor);
    FoldInto(residual_, inputs_, false, mismatch.cross.data(), gram, executor);
  }
  staged_rows_ = 0;
  wide_range_ = false;
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
