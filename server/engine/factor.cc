#include "engine/factor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/simd.h"

namespace certiq::engine {
namespace {

// A block of a panel.
struct Tile {
  double* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;

  double* row(int64_t r) const { return data + r * stride; }
};

// Block (p, q) of the panels, p <= q.
Tile BlockOf(UpperPanels<double>& m, int64_t p, int64_t q) {
  return {m.panel(p) + (m.begin(q) - m.begin(p)), m.rows(p), m.rows(q), m.stride(p)};
}

constexpr int64_t kWidth = kStrip<double>;
// Panels whose update of everything before them is made at once. An update reads and writes all
// that is left of the triangle: twice the panels, half the traffic. Two are a depth of 256, at
// which a strip of the packed operand (32 KiB with AVX-512) stays in a first-level cache.
constexpr int64_t kGroupPanels = 2;
constexpr int64_t kDepth = kGroupPanels * kPanelRows;

// Columns of U that are done and wait to update what is before them, as the kernel reads them:
// strips of kWidth rows, each [depth][kWidth].
struct Pending {
  // U and Y = U D of the rows before.
  UnsetVector<double> u;
  UnsetVector<double> y;
  // Columns that wait, at most kDepth.
  int64_t depth = 0;

  explicit Pending(int64_t rows)
      : u(static_cast<size_t>((rows + kWidth - 1) / kWidth * kWidth * kDepth)), y(u.size()) {}
  static int64_t Strip(int64_t row) { return row / kWidth * kWidth * kDepth; }
};

// Block (p, q) -= U_p D U_q^T over the columns that wait.
void UpdateBlock(const Pending& pending, int64_t p, int64_t q, UpperPanels<double>& u) {
  const Tile block = BlockOf(u, p, q);
  for (int64_t c = 0; c < block.cols; c += kWidth) {
    const int64_t live_cols = std::min(kWidth, block.cols - c);
    const double* right = pending.y.data() + Pending::Strip(u.begin(q) + c);
    for (int64_t r = 0; r < block.rows; r += kMicroRows) {
      // What lies below the diagonal is not kept.
      if (p == q && r >= c + live_cols) break;
      const int64_t live_rows = std::min<int64_t>(kMicroRows, block.rows - r);
      // Here long before it is needed.
      for (int64_t i = 0; i < live_rows; ++i) {
        __builtin_prefetch(block.row(r + i) + c, 1);
        __builtin_prefetch(block.row(r + i) + c + live_cols - 1, 1);
      }
      const double* left = pending.u.data() + Pending::Strip(u.begin(p) + r) + r % kWidth;
      Accumulator<double> sum = {};
      MultiplyStrip(pending.depth, left, kWidth, 1, right, sum);
      if (live_rows == kMicroRows && live_cols == kWidth) {
        for (int i = 0; i < kMicroRows; ++i) {
          double* to = block.row(r + i) + c;
          StoreVector(to, LoadVector(to) - sum.row[i][0]);
          StoreVector(to + kLanes<double>, LoadVector(to + kLanes<double>) - sum.row[i][1]);
        }
        continue;
      }
      for (int64_t i = 0; i < live_rows; ++i) {
        for (int64_t k = 0; k < live_cols; ++k) {
          block.row(r + i)[c + k] -= sum.row[i][k / kLanes<double>][k % kLanes<double>];
        }
      }
    }
  }
}

// Factors a diagonal block in place, last row first. False, with `bad` the
// row in the block, where a pivot is not positive and finite.
bool FactorDiagonalBlock(const Tile& block, double* d, int64_t* bad) {
  const int64_t n = block.rows;
  double column[kPanelRows];
  for (int64_t j = n - 1; j >= 0; --j) {
    const double pivot = block.row(j)[j];
    d[j] = pivot;
    if (!(pivot > 0) || !std::isfinite(pivot)) {
      *bad = j;
      return false;
    }
    for (int64_t i = 0; i < j; ++i) column[i] = block.row(i)[j];
    for (int64_t i = 0; i < j; ++i) {
      const double u = column[i] / pivot;
      // u_ij d_j u_kj = u_ij a_kj.
      double* row = block.row(i);
      for (int64_t k = i; k < j; ++k) row[k] -= u * column[k];
      row[j] = u;
    }
  }
  return true;
}

// U^T of a factored diagonal block, padded with zeros: row l holds U_cl for c < l.
struct Columns {
  UnsetVector<double> values = UnsetVector<double>(static_cast<size_t>(kPanelRows * kPanelRows));

  explicit Columns(const Tile& block) {
    std::fill(values.begin(), values.end(), 0.0);
    for (int64_t c = 0; c < block.rows; ++c) {
      for (int64_t l = c + 1; l < block.rows; ++l) {
        values[static_cast<size_t>(l * kPanelRows + c)] = block.row(c)[l];
      }
    }
  }
  const double* row(int64_t l) const { return values.data() + l * kPanelRows; }
};

// Solves Y U^T = A for kWidth rows of A = block (p, q) from row `first` on, U the factored diagonal
// block of q: A becomes Y D^-1, and Y and Y D^-1 are appended to what waits.
void SolveRows(const Tile& block, int64_t first, int64_t strip, const Columns& columns,
               const double* d, Pending& pending) {
  const int64_t live = std::min(kWidth, block.rows - first);
  double* y = pending.y.data() + strip + pending.depth * kWidth;
  double* u = pending.u.data() + strip + pending.depth * kWidth;
  if (live < kWidth) std::fill_n(y, block.cols * kWidth, 0.0);
  // Few rows at a time: rows lie a power of two apart, and a set of a first-level cache holds a
  // line of only so many.
  for (int64_t i0 = 0; i0 < live; i0 += kLanes<double>) {
    const int64_t i1 = std::min<int64_t>(i0 + kLanes<double>, live);
    for (int64_t l = 0; l < block.cols; ++l) {
      for (int64_t i = i0; i < i1; ++i) y[l * kWidth + i] = block.row(first + i)[l];
    }
  }
  // kMicroRows columns hear of all after them at once, then of one another.
  for (int64_t c0 = (block.cols - 1) / kMicroRows * kMicroRows; c0 >= 0; c0 -= kMicroRows) {
    const int64_t after = std::min(c0 + kMicroRows, block.cols);
    if (after < block.cols) {
      Accumulator<double> sum = {};
      MultiplyStrip(block.cols - after, columns.row(after) + c0, kPanelRows, 1, y + after * kWidth,
                    sum);
      for (int64_t c = c0; c < after; ++c) {
        double* to = y + c * kWidth;
        StoreVector(to, LoadVector(to) - sum.row[c - c0][0]);
        StoreVector(to + kLanes<double>, LoadVector(to + kLanes<double>) - sum.row[c - c0][1]);
      }
    }
    for (int64_t l = after - 1; l > c0; --l) {
      const double* from = y + l * kWidth;
      for (int64_t c = c0; c < l; ++c) {
        const double scalar = columns.row(l)[c];
        double* to = y + c * kWidth;
        for (int64_t i = 0; i < kWidth; ++i) to[i] -= scalar * from[i];
      }
    }
  }
  for (int64_t l = 0; l < block.cols; ++l) {
    for (int64_t i = 0; i < kWidth; ++i) u[l * kWidth + i] = y[l * kWidth + i] / d[l];
  }
  for (int64_t i0 = 0; i0 < live; i0 += kLanes<double>) {
    const int64_t i1 = std::min<int64_t>(i0 + kLanes<double>, live);
    for (int64_t l = 0; l < block.cols; ++l) {
      for (int64_t i = i0; i < i1; ++i) block.row(first + i)[l] = u[l * kWidth + i];
    }
  }
}

// Columns of panel q of every row before it, by strips of rows.
void SolvePanel(Factor& f, int64_t q, Pending& pending, Executor& executor) {
  const Columns columns(BlockOf(f.u, q, q));
  constexpr int64_t kStrips = kPanelRows / kWidth;
  executor.ParallelFor(q, [&](int64_t p) {
    for (int64_t s = 0; s < kStrips; ++s) {
      const int64_t row = f.u.begin(p) + s * kWidth;
      SolveRows(BlockOf(f.u, p, q), s * kWidth, Pending::Strip(row), columns, &f.d[f.u.begin(q)],
                pending);
    }
  });
}

// Everything before panel q hears of the columns that wait.
void UpdateBefore(int64_t q, Pending& pending, UpperPanels<double>& u, Executor& executor) {
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

double OneNorm(const UpperPanels<double>& gram, double lambda, Executor& executor) {
  const int64_t n = gram.size();
  // What each panel adds, then the sum over panels in order.
  std::vector<double> parts(static_cast<size_t>(gram.panels() * n));
  executor.ParallelFor(gram.panels(), [&](int64_t p) {
    double* sums = parts.data() + p * n;
    for (int64_t i = gram.begin(p); i < gram.end(p); ++i) {
      const double* row = gram.row(i);
      sums[i] += std::abs(row[0]);
      double right[kLanes<double>] = {};
      int64_t j = 1;
      for (; j + kLanes<double> <= n - i; j += kLanes<double>) {
        for (int lane = 0; lane < kLanes<double>; ++lane) {
          const double size = std::abs(row[j + lane]);
          right[lane] += size;
          sums[i + j + lane] += size;
        }
      }
      for (; j < n - i; ++j) {
        right[0] += std::abs(row[j]);
        sums[i + j] += std::abs(row[j]);
      }
      for (const double lane : right) sums[i] += lane;
    }
  });
  double largest = 0;
  for (int64_t j = 0; j < n; ++j) {
    double sum = lambda;
    for (int64_t p = 0; p < gram.panels(); ++p) sum += parts[static_cast<size_t>(p * n + j)];
    largest = std::max(largest, sum);
  }
  return largest;
}

// a . b
double Dot(const double* a, const double* b, int64_t count) {
  constexpr int64_t kChains = 4;
  Vector<double> sums[kChains] = {};
  constexpr int64_t kStep = kChains * kLanes<double>;
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    for (int64_t chain = 0; chain < kChains; ++chain) {
      const int64_t at = j + chain * kLanes<double>;
      sums[chain] += LoadVector(a + at) * LoadVector(b + at);
    }
  }
  double sum = 0;
  for (; j < count; ++j) sum += a[j] * b[j];
  const Vector<double> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int lane = 0; lane < kLanes<double>; ++lane) sum += all[lane];
  return sum;
}

// Higham's estimate of |H^-1|_1: at most five steps of the power-like
// iteration on the dual norms; H is symmetric.
double InverseOneNorm(const Factor& f, Executor& executor) {
  const int64_t n = f.u.size();
  std::vector<double> x(static_cast<size_t>(n), 1.0 / static_cast<double>(n));
  double estimate = 0;
  int64_t last = -1;
  for (int step = 0; step < 5; ++step) {
    SolveInPlace(f, x, executor);
    double norm = 0;
    for (const double v : x) norm += std::abs(v);
    if (!std::isfinite(norm)) return std::numeric_limits<double>::infinity();
    if (step > 0 && norm <= estimate) break;
    estimate = norm;
    std::vector<double> sign(x.size());
    for (size_t i = 0; i < x.size(); ++i) sign[i] = x[i] >= 0 ? 1.0 : -1.0;
    SolveInPlace(f, sign, executor);
    const auto largest = std::max_element(
        sign.begin(), sign.end(), [](double a, double b) { return std::abs(a) < std::abs(b); });
    const int64_t j = largest - sign.begin();
    if (j == last) break;
    last = j;
    std::fill(x.begin(), x.end(), 0.0);
    x[static_cast<size_t>(j)] = 1.0;
  }
  return estimate;
}

}  // namespace

double LargestCondition(int64_t features) {
  return 1.0 / (8.0 * static_cast<double>(features) * 0x1p-53);
}

void SolveInPlace(const Factor& factor, std::vector<double>& x, Executor& executor) {
  const UpperPanels<double>& u = factor.u;
  const int64_t n = u.size();
  // Reading U takes the time: pieces of a panel to every thread, its diagonal block to the caller.
  constexpr int64_t kRows = 16;
  for (int64_t p = u.panels() - 1; p >= 0; --p) {
    const int64_t after = u.end(p);
    executor.ParallelFor((u.rows(p) + kRows - 1) / kRows, [&](int64_t piece) {
      const int64_t first = u.begin(p) + piece * kRows;
      for (int64_t i = first; i < std::min(first + kRows, after); ++i) {
        x[i] -= Dot(u.row(i) + (after - i), x.data() + after, n - after);
      }
    });
    for (int64_t i = after - 1; i >= u.begin(p); --i) {
      x[i] -= Dot(u.row(i) + 1, x.data() + i + 1, after - i - 1);
    }
  }
  for (int64_t i = 0; i < n; ++i) x[i] /= factor.d[i];
  constexpr int64_t kColumns = 1024;
  for (int64_t p = 0; p < u.panels(); ++p) {
    const int64_t after = u.end(p);
    for (int64_t i = u.begin(p); i < after; ++i) {
      const double* row = u.row(i);
      for (int64_t j = i + 1; j < after; ++j) x[j] -= row[j - i] * x[i];
    }
    executor.ParallelFor((n - after + kColumns - 1) / kColumns, [&](int64_t piece) {
      const int64_t first = after + piece * kColumns;
      const int64_t last = std::min(first + kColumns, n);
      for (int64_t i = u.begin(p); i < after; ++i) {
        const double* row = u.row(i);
        const double value = x[i];
        for (int64_t j = first; j < last; ++j) x[j] -= row[j - i] * value;
      }
    });
  }
}

absl::StatusOr<FactorAttempt> FactorDamped(const UpperPanels<double>& gram,
                                           const std::vector<bool>& dead, double lambda,
                                           Condition condition, const RunContext& context) {
  FactorAttempt attempt;
  Factor& f = attempt.factor;
  Executor& executor = *context.executor;
  const int64_t n = gram.size();
  f.u = UpperPanels<double>::Unset(n);
  executor.ParallelFor(f.u.panels(), [&](int64_t p) {
    std::copy_n(gram.panel(p), f.u.rows(p) * f.u.stride(p), f.u.panel(p));
  });
  f.d.assign(static_cast<size_t>(n), 0.0);
  // In the units of the others, so that it does not pass for ill-conditioning where lambda is tiny.
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += gram.at(i, i);
  const double dead_pivot = lambda + trace / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    f.u.at(i, i) = dead[i] ? dead_pivot : gram.at(i, i) + lambda;
  }
  const auto reject = [&](StabilityCause cause, std::string detail) {
    attempt.cause = cause;
    attempt.detail = std::move(detail);
    attempt.factor = Factor();
    return std::move(attempt);
  };

  {
    Pending pending(n);
    for (int64_t q = f.u.panels() - 1; q >= 0; --q) {
      if (context.cancelled()) return context.CancellationStatus();
      if (pending.depth > 0) {
        executor.ParallelFor(q + 1, [&](int64_t p) { UpdateBlock(pending, p, q, f.u); });
      }
      int64_t bad = 0;
      if (!FactorDiagonalBlock(BlockOf(f.u, q, q), &f.d[f.u.begin(q)], &bad)) {
        const int64_t feature = f.u.begin(q) + bad;
        const double pivot = f.d[feature];
        return reject(std::isfinite(pivot) ? StabilityCause::kPivot : StabilityCause::kNonFinite,
                      absl::StrCat("pivot ", pivot, " at feature ", feature));
      }
      SolvePanel(f, q, pending, executor);
      pending.depth += f.u.rows(q);
      if (pending.depth + kPanelRows > kDepth) UpdateBefore(q, pending, f.u, executor);
      context.Report(Phase::kFactor,
                     1.0 - std::pow(static_cast<double>(q) / static_cast<double>(f.u.panels()), 2));
    }
  }

  // The 1-norm condition number is at most N times that in the 2-norm.
  const auto features = static_cast<double>(n);
  if (condition == Condition::kCheck &&
      features * (trace / lambda + features) < LargestCondition(n)) {
    return attempt;
  }
  const double norm = OneNorm(gram, lambda, executor);
  f.condition = norm * InverseOneNorm(f, executor);
  if (!std::isfinite(f.condition)) {
    return reject(StabilityCause::kNonFinite, "the condition estimate is not finite");
  }
  if (f.condition > LargestCondition(n)) {
    return reject(StabilityCause::kCondition, absl::StrCat("condition estimate ", f.condition,
                                                           " is above ", LargestCondition(n)));
  }
  return attempt;
}

}  // namespace certiq::engine
