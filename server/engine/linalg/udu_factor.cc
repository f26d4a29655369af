#include "engine/linalg/udu_factor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/kernels/simd.h"
#include "engine/linalg/cholesky.h"

namespace certiq::engine {
namespace {

double OneNorm(const UpperTriangle<double>& gram, double lambda, Executor& executor) {
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
// iteration on the dual norms; H is symmetric. What it starts from may have no part in the worst
// direction: equal features cancel. So no less than 1 / d_j, which H^-1 has on its diagonal at
// least, because U^-1 has ones there.
double InverseOneNorm(const Factor& f, Executor& executor) {
  const int64_t n = f.u.size();
  std::vector<double> x(static_cast<size_t>(n), 1.0 / static_cast<double>(n));
  const double diagonal = 1 / *std::min_element(f.d.begin(), f.d.end());
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
  return std::max(estimate, diagonal);
}

}  // namespace

const UpperTriangle<double>& WideU(const Factor& factor, UpperTriangle<double>& room,
                                   Executor& executor) {
  const UpperTriangle<float>& narrow = factor.narrow;
  if (narrow.size() == 0) return factor.u;
  room = UpperTriangle<double>::Unset(narrow.size());
  executor.ParallelFor(narrow.panels(), [&](int64_t p) {
    std::copy_n(narrow.panel(p), narrow.rows(p) * narrow.stride(p), room.panel(p));
  });
  return room;
}

std::vector<double> LiveD(const Factor& factor, const std::vector<bool>& dead) {
  std::vector<double> d = factor.d;
  for (size_t j = 0; j < dead.size(); ++j) {
    if (dead[j]) d[j] = 0;
  }
  return d;
}

double LargestCondition(int64_t features) {
  return 1.0 / (8.0 * static_cast<double>(features) * 0x1p-53);
}

void SolveInPlace(const Factor& factor, std::vector<double>& x, Executor& executor) {
  const UpperTriangle<double>& u = factor.u;
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

namespace {

// 2^-exponent H in T.
template <typename T>
CholeskyWork<T> Load(const UpperTriangle<double>& gram, const std::vector<double>& diagonal,
                     int exponent, Executor& executor) {
  CholeskyWork<T> f{UpperTriangle<T>::Unset(gram.size()), {}};
  const double unit = std::ldexp(1.0, -exponent);
  executor.ParallelFor(f.u.panels(), [&](int64_t p) {
    const double* from = gram.panel(p);
    T* to = f.u.panel(p);
    for (int64_t i = 0; i < f.u.rows(p) * f.u.stride(p); ++i)
      to[i] = static_cast<T>(unit * from[i]);
    for (int64_t i = f.u.begin(p); i < f.u.end(p); ++i) {
      f.u.at(i, i) = static_cast<T>(unit * diagonal[static_cast<size_t>(i)]);
    }
  });
  return f;
}

// Whether float32 is enough for what does not end in a certificate: elements of H come out of it as
// if they had been off by about sqrt(N) 2^-24 of the largest, and that is to stay far below lambda.
bool SingleIsEnough(const std::vector<double>& diagonal, double lambda) {
  const double largest = *std::max_element(diagonal.begin(), diagonal.end());
  return std::sqrt(static_cast<double>(diagonal.size())) * 0x1p-24 * largest <= 0.05 * lambda;
}

// In float32. None where a pivot is bad. Fails only by cancellation.
absl::StatusOr<std::optional<Factor>> FactorInSingle(const UpperTriangle<double>& gram,
                                                     const std::vector<double>& diagonal,
                                                     const RunContext& context) {
  const int exponent = std::ilogb(*std::max_element(diagonal.begin(), diagonal.end()));
  CholeskyWork<float> work = Load<float>(gram, diagonal, exponent, *context.executor);
  ASSIGN_OR_RETURN(const auto bad, FactorInPlace(work, context));
  if (bad.has_value()) return std::nullopt;
  Factor f;
  f.narrow = std::move(work.u);
  for (const float d : work.d) f.d.push_back(std::ldexp(static_cast<double>(d), exponent));
  return f;
}

}  // namespace

absl::StatusOr<FactorAttempt> FactorDamped(const UpperTriangle<double>& gram,
                                           const std::vector<bool>& dead, double lambda,
                                           FactorUse use, const RunContext& context) {
  FactorAttempt attempt;
  Factor& f = attempt.factor;
  Executor& executor = *context.executor;
  const int64_t n = gram.size();
  // In the units of the others, so that it does not pass for ill-conditioning where lambda is tiny.
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += gram.at(i, i);
  const double dead_pivot = lambda + trace / static_cast<double>(n);
  std::vector<double> diagonal(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    diagonal[static_cast<size_t>(i)] = dead[i] ? dead_pivot : gram.at(i, i) + lambda;
  }
  const auto reject = [&](StabilityCause cause, std::string detail) {
    attempt.cause = cause;
    attempt.detail = std::move(detail);
    attempt.factor = Factor();
    return std::move(attempt);
  };

  std::optional<Factor> single;
  if (use == FactorUse::kJudge && SingleIsEnough(diagonal, lambda)) {
    ASSIGN_OR_RETURN(single, FactorInSingle(gram, diagonal, context));
  }
  if (single.has_value()) {
    f = *std::move(single);
  } else {
    CholeskyWork<double> work = Load<double>(gram, diagonal, 0, executor);
    ASSIGN_OR_RETURN(const auto bad, FactorInPlace(work, context));
    if (bad.has_value()) {
      const auto [feature, pivot] = *bad;
      return reject(std::isfinite(pivot) ? StabilityCause::kPivot : StabilityCause::kNonFinite,
                    absl::StrCat("pivot ", pivot, " at feature ", feature));
    }
    f.u = std::move(work.u);
    f.d = std::move(work.d);
  }

  // The 1-norm condition number is at most N times that in the 2-norm.
  const auto features = static_cast<double>(n);
  if (use == FactorUse::kJudge && features * (trace / lambda + features) < LargestCondition(n)) {
    return attempt;
  }
  if (f.narrow.size() > 0) {
    UpperTriangle<double> room;
    WideU(f, room, executor);
    f.u = std::move(room);
    f.narrow = UpperTriangle<float>();
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
