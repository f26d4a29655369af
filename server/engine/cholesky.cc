#include "engine/cholesky.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/aligned.h"
#include "engine/simd.h"

namespace certiq::engine {
namespace {

// A block of a panel.
template <typename T>
struct Tile {
  T* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;

  T* row(int64_t r) const { return data + r * stride; }
};

// Block (p, q) of the panels, p <= q.
template <typename T>
Tile<T> BlockOf(UpperPanels<T>& m, int64_t p, int64_t q) {
  return {m.panel(p) + (m.begin(q) - m.begin(p)), m.rows(p), m.rows(q), m.stride(p)};
}

// Panels whose update of everything before them is made at once. An update reads and writes all
// that is left of the triangle: twice the panels, half the traffic. Two are a depth of 256, at
// which a strip of the packed operand (32 KiB with AVX-512) stays in a first-level cache.
constexpr int64_t kGroupPanels = 2;
constexpr int64_t kDepth = kGroupPanels * kPanelRows;

// Columns of U that are done and wait to update what is before them, as the kernel reads them:
// strips of kStrip rows, each [depth][kStrip].
template <typename T>
struct Pending {
  static constexpr int64_t kWidth = kStrip<T>;
  // U and Y = U D of the rows before.
  UnsetVector<T> u;
  UnsetVector<T> y;
  // Columns that wait, at most kDepth.
  int64_t depth = 0;

  explicit Pending(int64_t rows)
      : u(static_cast<size_t>((rows + kWidth - 1) / kWidth * kWidth * kDepth)), y(u.size()) {}
  static int64_t Strip(int64_t row) { return row / kWidth * kWidth * kDepth; }
};

// Block (p, q) -= U_p D U_q^T over the columns that wait.
template <typename T>
void UpdateBlock(const Pending<T>& pending, int64_t p, int64_t q, UpperPanels<T>& u) {
  constexpr int64_t kWidth = kStrip<T>;
  const Tile<T> block = BlockOf(u, p, q);
  for (int64_t c = 0; c < block.cols; c += kWidth) {
    const int64_t live_cols = std::min(kWidth, block.cols - c);
    const T* right = pending.y.data() + Pending<T>::Strip(u.begin(q) + c);
    for (int64_t r = 0; r < block.rows; r += kMicroRows) {
      // What lies below the diagonal is not kept.
      if (p == q && r >= c + live_cols) break;
      const int64_t live_rows = std::min<int64_t>(kMicroRows, block.rows - r);
      // Here long before it is needed.
      for (int64_t i = 0; i < live_rows; ++i) {
        __builtin_prefetch(block.row(r + i) + c, 1);
        __builtin_prefetch(block.row(r + i) + c + live_cols - 1, 1);
      }
      const T* left = pending.u.data() + Pending<T>::Strip(u.begin(p) + r) + r % kWidth;
      Accumulator<T> sum = {};
      MultiplyStrip(pending.depth, left, kWidth, 1, right, sum);
      if (live_rows == kMicroRows && live_cols == kWidth) {
        for (int i = 0; i < kMicroRows; ++i) {
          T* to = block.row(r + i) + c;
          StoreVector(to, LoadVector(to) - sum.row[i][0]);
          StoreVector(to + kLanes<T>, LoadVector(to + kLanes<T>) - sum.row[i][1]);
        }
        continue;
      }
      for (int64_t i = 0; i < live_rows; ++i) {
        for (int64_t k = 0; k < live_cols; ++k) {
          block.row(r + i)[c + k] -= sum.row[i][k / kLanes<T>][k % kLanes<T>];
        }
      }
    }
  }
}

// Factors a diagonal block in place, last row first. False, with `bad` the
// row in the block, where a pivot is not positive and finite.
template <typename T>
bool FactorDiagonalBlock(const Tile<T>& block, T* d, int64_t* bad) {
  const int64_t n = block.rows;
  T column[kPanelRows];
  for (int64_t j = n - 1; j >= 0; --j) {
    const T pivot = block.row(j)[j];
    d[j] = pivot;
    if (!(pivot > 0) || !std::isfinite(pivot)) {
      *bad = j;
      return false;
    }
    for (int64_t i = 0; i < j; ++i) column[i] = block.row(i)[j];
    for (int64_t i = 0; i < j; ++i) {
      const T u = column[i] / pivot;
      // u_ij d_j u_kj = u_ij a_kj.
      T* row = block.row(i);
      for (int64_t k = i; k < j; ++k) row[k] -= u * column[k];
      row[j] = u;
    }
  }
  return true;
}

// U^T of a factored diagonal block, padded with zeros: row l holds U_cl for c < l.
template <typename T>
struct Columns {
  UnsetVector<T> values = UnsetVector<T>(static_cast<size_t>(kPanelRows * kPanelRows));

  explicit Columns(const Tile<T>& block) {
    std::fill(values.begin(), values.end(), T{0});
    for (int64_t c = 0; c < block.rows; ++c) {
      for (int64_t l = c + 1; l < block.rows; ++l) {
        values[static_cast<size_t>(l * kPanelRows + c)] = block.row(c)[l];
      }
    }
  }
  const T* row(int64_t l) const { return values.data() + l * kPanelRows; }
};

// Solves Y U^T = A for kStrip rows of A = block (p, q) from row `first` on, U the factored diagonal
// block of q: A becomes Y D^-1, and Y and Y D^-1 are appended to what waits.
template <typename T>
void SolveRows(const Tile<T>& block, int64_t first, int64_t strip, const Columns<T>& columns,
               const T* d, Pending<T>& pending) {
  constexpr int64_t kWidth = kStrip<T>;
  const int64_t live = std::min(kWidth, block.rows - first);
  T* y = pending.y.data() + strip + pending.depth * kWidth;
  T* u = pending.u.data() + strip + pending.depth * kWidth;
  if (live < kWidth) std::fill_n(y, block.cols * kWidth, T{0});
  // Few rows at a time: rows lie a power of two apart, and a set of a first-level cache holds a
  // line of only so many.
  for (int64_t i0 = 0; i0 < live; i0 += kLanes<T>) {
    const int64_t i1 = std::min<int64_t>(i0 + kLanes<T>, live);
    for (int64_t l = 0; l < block.cols; ++l) {
      for (int64_t i = i0; i < i1; ++i) y[l * kWidth + i] = block.row(first + i)[l];
    }
  }
  // kMicroRows columns hear of all after them at once, then of one another.
  for (int64_t c0 = (block.cols - 1) / kMicroRows * kMicroRows; c0 >= 0; c0 -= kMicroRows) {
    const int64_t after = std::min(c0 + kMicroRows, block.cols);
    if (after < block.cols) {
      Accumulator<T> sum = {};
      MultiplyStrip(block.cols - after, columns.row(after) + c0, kPanelRows, 1, y + after * kWidth,
                    sum);
      for (int64_t c = c0; c < after; ++c) {
        T* to = y + c * kWidth;
        StoreVector(to, LoadVector(to) - sum.row[c - c0][0]);
        StoreVector(to + kLanes<T>, LoadVector(to + kLanes<T>) - sum.row[c - c0][1]);
      }
    }
    for (int64_t l = after - 1; l > c0; --l) {
      const T* from = y + l * kWidth;
      for (int64_t c = c0; c < l; ++c) {
        const T scalar = columns.row(l)[c];
        T* to = y + c * kWidth;
        for (int64_t i = 0; i < kWidth; ++i) to[i] -= scalar * from[i];
      }
    }
  }
  for (int64_t l = 0; l < block.cols; ++l) {
    for (int64_t i = 0; i < kWidth; ++i) u[l * kWidth + i] = y[l * kWidth + i] / d[l];
  }
  for (int64_t i0 = 0; i0 < live; i0 += kLanes<T>) {
    const int64_t i1 = std::min<int64_t>(i0 + kLanes<T>, live);
    for (int64_t l = 0; l < block.cols; ++l) {
      for (int64_t i = i0; i < i1; ++i) block.row(first + i)[l] = u[l * kWidth + i];
    }
  }
}

// Columns of panel q of every row before it, by strips of rows.
template <typename T>
void SolvePanel(CholeskyWork<T>& f, int64_t q, Pending<T>& pending, Executor& executor) {
  constexpr int64_t kWidth = kStrip<T>;
  const Columns<T> columns(BlockOf(f.u, q, q));
  constexpr int64_t kStrips = kPanelRows / kWidth;
  executor.ParallelFor(q, [&](int64_t p) {
    for (int64_t s = 0; s < kStrips; ++s) {
      const int64_t row = f.u.begin(p) + s * kWidth;
      SolveRows(BlockOf(f.u, p, q), s * kWidth, Pending<T>::Strip(row), columns, &f.d[f.u.begin(q)],
                pending);
    }
  });
}

// Everything before panel q hears of the columns that wait.
template <typename T>
void UpdateBefore(int64_t q, Pending<T>& pending, UpperPanels<T>& u, Executor& executor) {
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
