#include "engine/linalg/cholesky.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "engine/kernels/aligned.h"
#include "engine/kernels/simd.h"

namespace certiq::engine {
namespace {

// A block of a panel.
template <typename T>
struct CholeskyTile {
  T* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;

  T* row(int64_t r) const { return data + r * stride; }
};

// Block (p, q) of the panels, p <= q.
template <typename T>
CholeskyTile<T> BlockOf(UpperTriangle<T>& m, int64_t p, int64_t q) {
  return {m.panel(p) + (m.begin(q) - m.begin(p)), m.rows(p), m.rows(q), m.stride(p)};
}

// Panels whose update of everything before them is made at once. An update reads and writes all
// that is left of the triangle: twice the panels, half the traffic. Two are a depth of 256, at
// which a strip of the packed operand (32 KiB with AVX-512) stays in a first-level cache.
constexpr int64_t kGroupPanels = 2;
constexpr int64_t kDepth = kGroupPanels * kPanelRows;

// Columns of U that are done and wait to update what is before them, as the kernel reads them.
template <typename T>
struct Pending {
  static constexpr int64_t kWidth = kStrip<T>;
  // U of the rows before, groups of kMicroRows rows, each [depth][kMicroRows].
  UnsetVector<T> u;
  // Y = U D of the same, strips of kWidth rows, each [depth][kWidth].
  UnsetVector<T> y;
  // Columns that wait, at most kDepth.
  int64_t depth = 0;

  explicit Pending(int64_t rows)
      : u(static_cast<size_t>((rows + kWidth - 1) / kWidth * kWidth * kDepth)), y(u.size()) {}
  // Where the strip of y, and the group of u, starts that row `row` is in.
  static int64_t Strip(int64_t row) { return row / kWidth * kWidth * kDepth; }
  static int64_t Group(int64_t row) { return row / kMicroRows * kMicroRows * kDepth; }
};

// Block (p, q) -= U_p D U_q^T over the columns that wait.
template <typename T>
void UpdateBlock(const Pending<T>& pending, int64_t p, int64_t q, UpperTriangle<T>& u) {
  constexpr int64_t kWidth = kStrip<T>;
  const CholeskyTile<T> block = BlockOf(u, p, q);
  for (int64_t c = 0; c < block.cols; c += kWidth) {
    const int64_t live_cols = std::min(kWidth, block.cols - c);
    const T* right = pending.y.data() + Pending<T>::Strip(u.begin(q) + c);
    Prefetcher next(
        pending.y.data() + Pending<T>::Strip(u.begin(q) + c + kWidth),
        pending.depth * kWidth * static_cast<int64_t>(sizeof(T)) / (kPanelRows / kMicroRows));
    for (int64_t r = 0; r < block.rows; r += kMicroRows) {
      // What lies below the diagonal is not kept.
      if (p == q && r >= c + live_cols) break;
      const int64_t live_rows = std::min<int64_t>(kMicroRows, block.rows - r);
      next.FetchPart();
      // Here long before it is needed.
      for (int64_t i = 0; i < live_rows; ++i) {
        __builtin_prefetch(block.row(r + i) + c, 1);
        __builtin_prefetch(block.row(r + i) + c + live_cols - 1, 1);
        __builtin_prefetch(block.row(r + i) + c + kWidth, 1, 2);
        __builtin_prefetch(block.row(r + i) + c + 2 * kWidth - 1, 1, 2);
      }
      const T* left = pending.u.data() + Pending<T>::Group(u.begin(p) + r);
      Accumulator<T> sum;
      ClearAccumulator(sum);
      MultiplyStrip(pending.depth, left, kMicroRows, 1, right, sum);
      if (live_rows == kMicroRows && live_cols == kWidth) {
        SubtractAccumulator(sum, block.row(r) + c, block.stride);
        continue;
      }
      alignas(kVectorBytes) T edge[kMicroRows * kWidth];
      StoreAccumulator(sum, edge);
      for (int64_t i = 0; i < live_rows; ++i) {
        for (int64_t k = 0; k < live_cols; ++k) block.row(r + i)[c + k] -= edge[i * kWidth + k];
      }
    }
  }
}

// Factors a diagonal block in place, last row first. False, with `bad` the
// row in the block, where a pivot is not positive and finite.
template <typename T>
bool FactorDiagonalBlock(const CholeskyTile<T>& block, T* d, int64_t* bad) {
  const int64_t n = block.rows;
  // Rows of the block may lie a power of two apart, which few sets of a cache are left for.
  constexpr int64_t kStride = kPanelRows + kLanes<T>;
  UnsetVector<T> work(static_cast<size_t>(kPanelRows * kStride));
  const auto row = [&work](int64_t i) { return work.data() + i * kStride; };
  for (int64_t i = 0; i < n; ++i) std::copy(block.row(i) + i, block.row(i) + n, row(i) + i);
  T column[kPanelRows];
  for (int64_t j = n - 1; j >= 0; --j) {
    const T pivot = row(j)[j];
    d[j] = pivot;
    if (!(pivot > 0) || !std::isfinite(pivot)) {
      *bad = j;
      return false;
    }
    const T reciprocal = T{1} / pivot;
    for (int64_t i = 0; i < j; ++i) column[i] = row(i)[j];
    for (int64_t i = 0; i < j; ++i) {
      const T u = column[i] * reciprocal;
      // u_ij d_j u_kj = u_ij a_kj.
      T* to = row(i);
      for (int64_t k = i; k < j; ++k) to[k] -= u * column[k];
      to[j] = u;
    }
  }
  for (int64_t i = 0; i < n; ++i) std::copy(row(i) + i, row(i) + n, block.row(i) + i);
  return true;
}

// U^T of a factored diagonal block, padded with zeros: row l holds U_cl for c < l.
template <typename T>
struct Columns {
  UnsetVector<T> values = UnsetVector<T>(static_cast<size_t>(kPanelRows * kPanelRows));

  explicit Columns(const CholeskyTile<T>& block) {
    std::fill(values.begin(), values.end(), T{0});
    for (int64_t c = 0; c < block.rows; ++c) {
      for (int64_t l = c + 1; l < block.rows; ++l) {
        values[static_cast<size_t>(l * kPanelRows + c)] = block.row(c)[l];
      }
    }
  }
  const T* row(int64_t l) const { return values.data() + l * kPanelRows; }
};

// kStrip rows of a block, from row `first` on, to [columns][kStrip].
template <typename T>
void LoadStrip(const CholeskyTile<T>& block, int64_t first, T* to) {
  constexpr int64_t kSide = kLanes<T>;
  const int64_t whole = block.cols / kSide * kSide;
  // Few rows at a time: rows lie a power of two apart, and a set of a first-level cache holds a
  // line of only so many.
  for (int64_t i0 = 0; i0 < kStrip<T>; i0 += kSide) {
    for (int64_t l0 = 0; l0 < whole; l0 += kSide) {
      Vector<T> square[kSide];
      for (int64_t i = 0; i < kSide; ++i) square[i] = LoadVector(block.row(first + i0 + i) + l0);
      TransposeSquare<T>(square);
      for (int64_t l = 0; l < kSide; ++l) StoreVector(to + (l0 + l) * kStrip<T> + i0, square[l]);
    }
    for (int64_t l = whole; l < block.cols; ++l) {
      for (int64_t i = i0; i < i0 + kSide; ++i) to[l * kStrip<T> + i] = block.row(first + i)[l];
    }
  }
}

// Y [columns][kStrip] times 1 / D, back to the block and as the kernel reads it to `u`.
template <typename T>
void StoreScaled(const T* y, const T* reciprocal, int64_t first, const CholeskyTile<T>& block,
                 T* u) {
  constexpr int64_t kSide = kLanes<T>;
  // A vector is some groups of the kernel, or a part of one.
  constexpr int64_t kPart = std::min<int64_t>(kSide, kMicroRows);
  const int64_t whole = block.cols / kSide * kSide;
  for (int64_t i0 = 0; i0 < kStrip<T>; i0 += kSide) {
    const auto scaled = [&](int64_t l) {
      const Vector<T> row = reciprocal[l] * LoadVector(y + l * kStrip<T> + i0);
      for (int64_t part = 0; part < kSide; part += kPart) {
        const int64_t i = i0 + part;
        std::memcpy(u + Pending<T>::Group(i) + l * kMicroRows + i % kMicroRows,
                    reinterpret_cast<const T*>(&row) + part, kPart * sizeof(T));
      }
      return row;
    };
    for (int64_t l0 = 0; l0 < whole; l0 += kSide) {
      Vector<T> square[kSide];
      for (int64_t l = 0; l < kSide; ++l) square[l] = scaled(l0 + l);
      TransposeSquare<T>(square);
      for (int64_t i = 0; i < kSide; ++i) StoreVector(block.row(first + i0 + i) + l0, square[i]);
    }
    for (int64_t l = whole; l < block.cols; ++l) {
      const Vector<T> row = scaled(l);
      for (int64_t i = 0; i < kSide; ++i) block.row(first + i0 + i)[l] = row[i];
    }
  }
}

// kMicroRows columns y of Y U^T = A, `later` columns after them being solved. `columns` is where
// their own rows of U^T start. In registers.
template <typename T>
__attribute__((noinline)) void SolveGroup(int64_t later, const T* columns, T* y) {
  constexpr int64_t kWidth = kStrip<T>;
  Accumulator<T> sum;
  ClearAccumulator(sum);
  MultiplyStrip(later, columns + kMicroRows * kPanelRows, kPanelRows, 1, y + kMicroRows * kWidth,
                sum);
#pragma GCC unroll 8
  for (int l = kMicroRows - 1; l >= 0; --l) {
    T* to = y + l * kWidth;
    const Vector<T> low = LoadVector(to) - sum.row[l][0];
    const Vector<T> high = LoadVector(to + kLanes<T>) - sum.row[l][1];
    StoreVector(to, low);
    StoreVector(to + kLanes<T>, high);
#pragma GCC unroll 8
    for (int c = 0; c < l; ++c) {
      const T scalar = columns[l * kPanelRows + c];
      sum.row[c][0] += scalar * low;
      sum.row[c][1] += scalar * high;
    }
  }
}

// Solves Y U^T = A for kStrip rows of A = block (p, q) from row `first` on, U the factored diagonal
// block of q: A becomes Y D^-1, and Y and Y D^-1 are appended to what waits.
template <typename T>
void SolveRows(const CholeskyTile<T>& block, int64_t first, int64_t strip,
               const Columns<T>& columns, const T* reciprocal, Pending<T>& pending) {
  constexpr int64_t kWidth = kStrip<T>;
  T* y = pending.y.data() + strip + pending.depth * kWidth;
  LoadStrip(block, first, y);
  // kMicroRows columns get the feedback of all after them at once, then of one another.
  for (int64_t c0 = (block.cols - 1) / kMicroRows * kMicroRows; c0 >= 0; c0 -= kMicroRows) {
    const int64_t count = std::min<int64_t>(kMicroRows, block.cols - c0);
    if (count == kMicroRows) {
      SolveGroup(block.cols - c0 - kMicroRows, columns.row(c0) + c0, y + c0 * kWidth);
      continue;
    }
    for (int64_t l = c0 + count - 1; l > c0; --l) {
      for (int64_t c = c0; c < l; ++c) {
        const T scalar = columns.row(l)[c];
        for (int64_t i = 0; i < kWidth; ++i) y[c * kWidth + i] -= scalar * y[l * kWidth + i];
      }
    }
  }
  StoreScaled(y, reciprocal, first, block, pending.u.data() + strip + pending.depth * kMicroRows);
}

// Columns of panel q of every row before it, by strips of rows. Panels before the last are whole.
template <typename T>
void SolvePanel(CholeskyWork<T>& f, int64_t q, Pending<T>& pending, Executor& executor) {
  constexpr int64_t kWidth = kStrip<T>;
  const Columns<T> columns(BlockOf(f.u, q, q));
  std::vector<T> reciprocal;
  for (int64_t i = f.u.begin(q); i < f.u.end(q); ++i) reciprocal.push_back(T{1} / f.d[i]);
  constexpr int64_t kStrips = kPanelRows / kWidth;
  executor.ParallelFor(q, [&](int64_t p) {
    for (int64_t s = 0; s < kStrips; ++s) {
      const int64_t row = f.u.begin(p) + s * kWidth;
      SolveRows(BlockOf(f.u, p, q), s * kWidth, Pending<T>::Strip(row), columns, reciprocal.data(),
                pending);
    }
  });
}

// Everything before panel q hears of the columns that wait.
template <typename T>
void UpdateBefore(int64_t q, Pending<T>& pending, UpperTriangle<T>& u, Executor& executor) {
  std::vector<std::pair<int64_t, int64_t>> blocks;
  blocks.reserve(static_cast<size_t>(q * (q + 1) / 2));
  for (int64_t p = 0; p < q; ++p) {
    for (int64_t r = p; r < q; ++r) blocks.emplace_back(p, r);
  }
  executor.ParallelFor(static_cast<int64_t>(blocks.size()), [&](int64_t at) {
    const auto [p, r] = blocks[static_cast<size_t>(at)];
    UpdateBlock(pending, p, r, u);
  });
  pending.depth = 0;
}

}  // namespace

template <typename T>
absl::StatusOr<std::optional<BadPivot>> FactorInPlace(CholeskyWork<T>& f,
                                                      const RunContext& context) {
  Executor& executor = *context.executor;
  f.d.assign(static_cast<size_t>(f.u.size()), T{0});
  Pending<T> pending(f.u.size());
  for (int64_t q = f.u.panels() - 1; q >= 0; --q) {
    if (context.cancelled()) return context.CancellationStatus();
    if (pending.depth > 0) {
      executor.ParallelFor(q + 1, [&](int64_t p) { UpdateBlock(pending, p, q, f.u); });
    }
    int64_t bad = 0;
    if (!FactorDiagonalBlock(BlockOf(f.u, q, q), &f.d[f.u.begin(q)], &bad)) {
      const int64_t feature = f.u.begin(q) + bad;
      return BadPivot{feature, static_cast<double>(f.d[feature])};
    }
    SolvePanel(f, q, pending, executor);
    pending.depth += f.u.rows(q);
    if (pending.depth + kPanelRows > kDepth) UpdateBefore(q, pending, f.u, executor);
    context.Report(Phase::kFactor,
                   1.0 - std::pow(static_cast<double>(q) / static_cast<double>(f.u.panels()), 2));
  }
  return std::nullopt;
}

template absl::StatusOr<std::optional<BadPivot>> FactorInPlace(CholeskyWork<float>& work,
                                                               const RunContext& context);
template absl::StatusOr<std::optional<BadPivot>> FactorInPlace(CholeskyWork<double>& work,
                                                               const RunContext& context);

}  // namespace certiq::engine
