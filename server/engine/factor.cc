#include "engine/factor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

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

// Depth of a slice of the update: a slice of the packed operand, 256 x 128
// float64, is 256 KiB and stays in a second-level cache beside the rows it
// meets.
constexpr int64_t kDepth = 256;

// Block (p, q) of the panels, p <= q.
Tile BlockOf(UpperPanels<double>& m, int64_t p, int64_t q) {
  return {m.panel(p) + (m.begin(q) - m.begin(p)), m.rows(p), m.rows(q), m.stride(p)};
}

// D_l U_kl for the rows k of panel q and the columns l after it, in strips of
// columns k: [strip][l][kStrip].
std::vector<double> PackScaledRows(const Factor& f, int64_t q) {
  const int64_t after = f.u.end(q);
  const int64_t depth = f.u.size() - after;
  constexpr int64_t kWidth = kStrip<double>;
  const int64_t strips = (f.u.rows(q) + kWidth - 1) / kWidth;
  std::vector<double> packed(static_cast<size_t>(strips * depth * kWidth));
  for (int64_t r = 0; r < f.u.rows(q); ++r) {
    const double* row = f.u.panel(q) + r * f.u.stride(q) + f.u.rows(q);
    double* to = packed.data() + (r / kWidth) * depth * kWidth + r % kWidth;
    for (int64_t l = 0; l < depth; ++l) to[l * kWidth] = f.d[after + l] * row[l];
  }
  return packed;
}

// Block (p, q) -= U_{p, after q} D U_{q, after q}^T.
void UpdateBlock(Factor& f, int64_t p, int64_t q, const std::vector<double>& packed) {
  UpperPanels<double>& u = f.u;
  const int64_t depth = u.size() - u.end(q);
  constexpr int64_t kWidth = kStrip<double>;
  const Tile block = BlockOf(u, p, q);
  const double* rows = u.panel(p) + (u.end(q) - u.begin(p));
  double out[kPanelRows * kWidth];
  for (int64_t l0 = 0; l0 < depth; l0 += kDepth) {
    const int64_t slice = std::min(kDepth, depth - l0);
    for (int64_t c = 0; c < u.rows(q); c += kWidth) {
      const int64_t live = std::min(kWidth, u.rows(q) - c);
      const double* b = packed.data() + (c / kWidth) * depth * kWidth + l0 * kWidth;
      std::fill_n(out, kPanelRows * kWidth, 0.0);
      MultiplyIntoStrip(u.rows(p), slice, rows + l0, 1, u.stride(p), b, out);
      for (int64_t r = 0; r < u.rows(p); ++r) {
        for (int64_t k = 0; k < live; ++k) block.row(r)[c + k] -= out[r * kWidth + k];
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

// Solves Y U^T = A in place for a factored diagonal block U, then divides the
// columns of Y by `d`. `columns` is U^T: row l holds U_cl for c < l.
void SolveBlock(const Tile& block, const std::vector<double>& columns, const double* d) {
  for (int64_t i = 0; i < block.rows; ++i) {
    double* row = block.row(i);
    for (int64_t l = block.cols - 1; l > 0; --l) {
      const double y = row[l];
      const double* column = columns.data() + l * kPanelRows;
      for (int64_t c = 0; c < l; ++c) row[c] -= y * column[c];
    }
    for (int64_t c = 0; c < block.cols; ++c) row[c] /= d[c];
  }
}

double OneNorm(const UpperPanels<double>& gram, double lambda) {
  const int64_t n = gram.size();
  std::vector<double> sums(static_cast<size_t>(n), lambda);
  for (int64_t i = 0; i < n; ++i) {
    const double* row = gram.row(i);
    sums[i] += std::abs(row[0]);
    for (int64_t j = i + 1; j < n; ++j) {
      sums[i] += std::abs(row[j - i]);
      sums[j] += std::abs(row[j - i]);
    }
  }
  return *std::max_element(sums.begin(), sums.end());
}

// Higham's estimate of |H^-1|_1: at most five steps of the power-like
// iteration on the dual norms; H is symmetric.
double InverseOneNorm(const Factor& f) {
  const int64_t n = f.u.size();
  std::vector<double> x(static_cast<size_t>(n), 1.0 / static_cast<double>(n));
  double estimate = 0;
  int64_t last = -1;
  for (int step = 0; step < 5; ++step) {
    SolveInPlace(f, x);
    double norm = 0;
    for (const double v : x) norm += std::abs(v);
    if (!std::isfinite(norm)) return std::numeric_limits<double>::infinity();
    if (step > 0 && norm <= estimate) break;
    estimate = norm;
    std::vector<double> sign(x.size());
    for (size_t i = 0; i < x.size(); ++i) sign[i] = x[i] >= 0 ? 1.0 : -1.0;
    SolveInPlace(f, sign);
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

void SolveInPlace(const Factor& factor, std::vector<double>& x) {
  const int64_t n = factor.u.size();
  for (int64_t i = n - 1; i >= 0; --i) {
    const double* row = factor.u.row(i);
    double sum = 0;
    for (int64_t j = i + 1; j < n; ++j) sum += row[j - i] * x[j];
    x[i] -= sum;
  }
  for (int64_t i = 0; i < n; ++i) x[i] /= factor.d[i];
  for (int64_t i = 0; i < n; ++i) {
    const double* row = factor.u.row(i);
    const double value = x[i];
    for (int64_t j = i + 1; j < n; ++j) x[j] -= row[j - i] * value;
  }
}

absl::StatusOr<FactorAttempt> FactorDamped(const UpperPanels<double>& gram,
                                           const std::vector<bool>& dead, double lambda,
                                           const RunContext& context) {
  FactorAttempt attempt;
  Factor& f = attempt.factor;
  const int64_t n = gram.size();
  f.u = gram;
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

  for (int64_t q = f.u.panels() - 1; q >= 0; --q) {
    if (context.cancelled()) return context.CancellationStatus();
    if (q + 1 < f.u.panels()) {
      const std::vector<double> packed = PackScaledRows(f, q);
      context.executor->ParallelFor(q + 1, [&](int64_t p) { UpdateBlock(f, p, q, packed); });
    }
    int64_t bad = 0;
    if (!FactorDiagonalBlock(BlockOf(f.u, q, q), &f.d[f.u.begin(q)], &bad)) {
      const int64_t feature = f.u.begin(q) + bad;
      const double pivot = f.d[feature];
      return reject(std::isfinite(pivot) ? StabilityCause::kPivot : StabilityCause::kNonFinite,
                    absl::StrCat("pivot ", pivot, " at feature ", feature));
    }
    // Block (p, q) holds A = Y U_qq^T with Y = U_pq D_q.
    std::vector<double> columns(static_cast<size_t>(kPanelRows * kPanelRows));
    const Tile diagonal = BlockOf(f.u, q, q);
    for (int64_t c = 0; c < diagonal.rows; ++c) {
      for (int64_t l = c + 1; l < diagonal.rows; ++l) {
        columns[static_cast<size_t>(l * kPanelRows + c)] = diagonal.row(c)[l];
      }
    }
    context.executor->ParallelFor(
        q, [&](int64_t p) { SolveBlock(BlockOf(f.u, p, q), columns, &f.d[f.u.begin(q)]); });
    context.Report(Phase::kFactor,
                   1.0 - std::pow(static_cast<double>(q) / static_cast<double>(f.u.panels()), 2));
  }

  const double norm = OneNorm(gram, lambda);
  f.condition = norm * InverseOneNorm(f);
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
