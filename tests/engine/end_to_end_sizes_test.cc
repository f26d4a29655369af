// The whole chain against float64 at small, odd and large sizes: tokens to sums, sums to factor,
// factor to codes, codes to certificate. Each link is checked given the one before it, by
// residuals where recomputing would cost N^3.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>

#include "engine/certify/certify.h"
#include "engine/gram/quadratic_form.h"
#include "engine/methods/optq.h"
#include "engine/methods/qronos.h"
#include "engine/methods/rtn.h"
#include "engine/methods/run_method.h"
#include "tests/engine/problems.h"
#include "tests/engine/replay.h"

namespace certiq::engine {
namespace {

constexpr int64_t kRows = 4;
constexpr double kUnit = 0x1p-24;
// Entries of sums: chains of 15 float32 additions, and P = X - X~ rounded once for each factor.
constexpr double kSumError = 17 * kUnit;

// X in columns, so that entries of sums are sums over contiguous values.
textbook::Matrix Columns(const textbook::Matrix& x) {
  textbook::Matrix columns(x.cols, x.rows);
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t j = 0; j < x.cols; ++j) columns(j, t) = x(t, j);
  }
  return columns;
}

double Dot(const textbook::Matrix& a, int64_t i, const textbook::Matrix& b, int64_t j) {
  double sum = 0;
  for (int64_t t = 0; t < a.cols; ++t) sum += a(i, t) * b(j, t);
  return sum;
}

// All pairs i <= j where they are few, else some, the corners and the diagonal among them.
std::vector<std::pair<int64_t, int64_t>> Pairs(int64_t n) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  if (n <= 65) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j) pairs.emplace_back(i, j);
    }
    return pairs;
  }
  std::mt19937_64 random(static_cast<uint64_t>(n));
  std::uniform_int_distribution<int64_t> any(0, n - 1);
  pairs = {{0, 0}, {0, n - 1}, {n - 1, n - 1}, {127, 128}, {0, 128}, {128, n - 1}};
  for (int i = 0; i < 2000; ++i) {
    const int64_t a = any(random);
    const int64_t b = any(random);
    pairs.emplace_back(std::min(a, b), std::max(a, b));
    if (i < 100) pairs.emplace_back(a, a);
  }
  return pairs;
}

class EverySize : public ::testing::TestWithParam<int64_t> {
 protected:
  EverySize() {
    context_.executor = &executor_;
    // 4096 features of 300 tokens: without lambda there is no factor.
    const int64_t tokens = n_ <= 65 ? 3 * n_ + 5 : n_ == 4096 ? 300 : n_ + 100;
    problem_ = testing::MakeLayer(tokens, n_, kRows, testing::Inputs::kCorrelated, 400 + n_);
    problem_.x_quantized = testing::Disturbed(problem_.x, 0.3, 401 + n_);
    inputs_ = Columns(problem_.x_quantized);
    residual_ = Columns(problem_.x);
    for (size_t i = 0; i < inputs_.values.size(); ++i) residual_.values[i] -= inputs_.values[i];
    layer_ = MakeWorkingLayer(spec_,
                              std::make_shared<const Statistics>(
                                  testing::AccumulatePair(problem_.x, problem_.x_quantized)),
                              testing::Strips(problem_.w), context_);
    for (int64_t j = 0; j < n_; ++j) {
      input_norm_.push_back(std::sqrt(Dot(inputs_, j, inputs_, j)));
      residual_norm_.push_back(std::sqrt(Dot(residual_, j, residual_, j)));
    }
  }

  double Gram(int64_t i, int64_t j) const {
    return layer_.statistics().gram.at(std::min(i, j), std::max(i, j));
  }
  double Size(const std::vector<double>& norms, int64_t i) const {
    return norms[static_cast<size_t>(i)];
  }

  void CheckSums() const;
  void CheckFactor(const Factor& factor, double lambda) const;
  void CheckSweep(const RoundedLayer& fit, bool qronos) const;
  void CheckCertificate(const RoundedLayer& fit, Method method) const;

  int64_t n_ = GetParam();
  SerialExecutor executor_;
  RunContext context_;
  ResolvedSpec spec_;
  testing::RandomLayer problem_;
  // [features, tokens]: X~ and X - X~, and the norms of their rows.
  textbook::Matrix inputs_;
  textbook::Matrix residual_;
  std::vector<double> input_norm_;
  std::vector<double> residual_norm_;
  WorkingLayer layer_;
  EngineSeconds seconds_;
};

void EverySize::CheckSums() const {
  const MismatchSums& mismatch = *layer_.statistics().mismatch;
  for (const auto& [i, j] : Pairs(n_)) {
    const double h = Dot(inputs_, i, inputs_, j);
    ASSERT_NEAR(Gram(i, j), h, 1e-6 * Size(input_norm_, i) * Size(input_norm_, j)) << i << " " << j;
    ASSERT_NEAR(mismatch.residual.at(i, j), Dot(residual_, i, residual_, j),
                kSumError * Size(residual_norm_, i) * Size(residual_norm_, j));
    ASSERT_NEAR(mismatch.cross[static_cast<size_t>(i * n_ + j)], Dot(residual_, i, inputs_, j),
                kSumError * Size(residual_norm_, i) * Size(input_norm_, j));
    ASSERT_NEAR(mismatch.cross[static_cast<size_t>(j * n_ + i)], Dot(residual_, j, inputs_, i),
                kSumError * Size(residual_norm_, j) * Size(input_norm_, i));
  }
}

// Higham, Thm 10.3: |U D U^T - H| <= gamma_{n+1} |U| D |U|^T, whose entries are at most
// gamma_{n+1} sqrt(H_ii H_jj).
void EverySize::CheckFactor(const Factor& f, double lambda) const {
  const auto u = [&](int64_t i, int64_t j) { return i == j ? 1.0 : f.u.at(i, j); };
  for (const auto& [i, j] : Pairs(n_)) {
    double sum = 0;
    for (int64_t l = j; l < n_; ++l) sum += u(i, l) * f.d[static_cast<size_t>(l)] * u(j, l);
    const double size = std::sqrt((Gram(i, i) + lambda) * (Gram(j, j) + lambda));
    ASSERT_NEAR(sum, Gram(i, j) + (i == j ? lambda : 0),
                4.0 * (static_cast<double>(n_) + 2) * 0x1p-53 * size)
        << i << " " << j;
  }
}

// Codes are the nearest to float64 targets, and what the sweep says of its errors holds for those.
void EverySize::CheckSweep(const RoundedLayer& fit, bool qronos) const {
  const Factor& factor = *fit.damping->factor;
  int64_t ties = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    const uint8_t* begin = fit.codes.data() + r * n_;
    const std::vector<int> codes(begin, begin + n_);
    std::vector<double> start = testing::Row(problem_.w, r);
    const auto grid = textbook::AbsmaxGrid(start, 4, true, 0);
    double start_slack = 0;
    double e1 = 0;
    if (qronos) {
      const double q1 = fit.grid.Level(r, 0, codes[0]);
      const auto solved =
          testing::StartOfQronos(layer_.statistics(), factor, fit.damping->lambda_used, start, q1);
      EXPECT_LE(solved.residual, 1);
      start = solved.targets;
      start_slack = solved.slack;
      EXPECT_EQ(codes[0], grid.Code(0, start[0]));
      e1 = start[0] - q1;
      start[0] = q1;
    }
    const auto f = testing::Replay(factor, start, start_slack, grid, codes, qronos ? 1 : 0);
    EXPECT_LE(f.worst, 1) << "row " << r << ": a code whose target is no tie is another";
    ties += f.ties;
    double damped = 0;
    double bound = 0;
    double damped_slack = 0;
    double bound_slack = 0;
    for (int64_t j = 0; j < n_; ++j) {
      const auto at = static_cast<size_t>(j);
      const double e = std::abs(f.error[at]);
      const double d = factor.d[at];
      // What the certificate may be off by, were every target off by its slack.
      const double off = f.slack[at];
      damped += d * e * e;
      damped_slack += d * (2 * e * off + off * off);
      const double eps = std::max(0.5 * grid.scale[0], qronos && j == 0 ? std::abs(e1) : e);
      const double wider = off + 0x1p-22 * (std::abs(f.target[at]) + off);
      bound += d * eps * eps;
      bound_slack += d * (2 * eps * wider + wider * wider);
    }
    const auto at = static_cast<size_t>(r);
    EXPECT_NEAR(fit.rounding[at], damped, damped_slack + 1e-9 * damped);
    // (B1), the part of (B3) that rounding adds; the other part is |P w|, or below it.
    const double initial = qronos ? 0 : fit.initial[at];
    EXPECT_GE(fit.bound[at], (1 - 1e-7) * (std::sqrt(bound) + initial));
    if (!qronos) {
      EXPECT_LE(fit.bound[at], (std::sqrt(bound + bound_slack) + initial) * (1 + 2e-6));
    }
  }
  EXPECT_LE(ties, 2) << "ties are rare in random data";
}

// From tokens and weights alone. A quadratic form of sums is off by kSumError (|P|.|w| +
// |X~|.|x|)^2 with the columns' norms, x = w - q; forms in float32 add sqrt(N) 2^-24 of the same.
void EverySize::CheckCertificate(const RoundedLayer& fit, Method method) const {
  LayerCertificate c;
  c.rows = kRows;
  c.features = n_;
  c.tokens = layer_.statistics().tokens;
  c.spec = spec_;
  c.spec.method = method;
  const auto energies =
      ReferenceEnergies(layer_.statistics(), layer_.reference, Phase::kReference, context_);
  ASSERT_TRUE(energies.ok());
  c.reference_energy = Sum(*energies);
  ASSERT_TRUE(Certify(c.spec, layer_, fit, context_, c).ok());

  double squared = 0;
  double damped = 0;
  double energy = 0;
  for (int64_t r = 0; r < kRows; ++r) {
    const std::vector<double> w = testing::Row(problem_.w, r);
    std::vector<double> out(static_cast<size_t>(problem_.x.rows));
    std::vector<double> error(out.size());
    double norm = 0;
    double reach = 0;
    for (int64_t j = 0; j < n_; ++j) {
      const auto at = static_cast<size_t>(j);
      const double q = fit.grid.Level(r, j, fit.codes[static_cast<size_t>(r * n_ + j)]);
      norm += (w[at] - q) * (w[at] - q);
      reach += residual_norm_[at] * std::abs(w[at]) + input_norm_[at] * std::abs(w[at] - q);
      for (size_t t = 0; t < out.size(); ++t) {
        const auto token = static_cast<int64_t>(t);
        const double p = residual_(j, token);
        const double x = inputs_(j, token);
        error[t] += p * w[at] + x * (w[at] - q);
        out[t] += (p + x) * w[at];
      }
    }
    double row = 0;
    for (size_t t = 0; t < out.size(); ++t) {
      row += error[t] * error[t];
      energy += out[t] * out[t];
    }
    const auto at = static_cast<size_t>(r);
    const double slack =
        (kSumError + 8 * std::sqrt(static_cast<double>(n_)) * kUnit) * reach * reach;
    EXPECT_NEAR(c.row_error[at] * c.row_error[at], row, slack) << "row " << r;
    // What the certificate promises, whatever the derivation allows.
    EXPECT_NEAR(c.row_error[at], std::sqrt(row), 1e-4 * std::sqrt(row)) << "row " << r;
    EXPECT_LE(std::sqrt(row + c.lambda_used * norm), c.row_bound[at]) << "row " << r;
    squared += row;
    damped += row + c.lambda_used * norm;
  }
  EXPECT_NEAR(c.squared_error, squared, 2e-4 * squared);
  EXPECT_NEAR(c.damped_squared_error, damped, 2e-4 * damped);
  EXPECT_NEAR(c.reference_energy, energy, 2e-4 * energy);
  EXPECT_NEAR(c.relative_error, std::sqrt(squared / energy), 1e-4 * std::sqrt(squared / energy));
  EXPECT_LE(std::sqrt(squared), c.l2_bound);
  EXPECT_LE(c.identity_residual, 1e-4);
}

TEST_P(EverySize, HoldsFromTokensToCertificate) {
  CheckSums();
  const double lambda = 0.01 * MeanDiagonal(layer_.statistics().gram);
  absl::StatusOr<RoundedLayer> fit = RunMethod(spec_, layer_, lambda, {}, context_, seconds_);
  ASSERT_TRUE(fit.ok()) << fit.status();
  ASSERT_EQ(fit->damping->attempts.size(), 1u);
  CheckFactor(*fit->damping->factor, lambda);
  for (int64_t r = 0; r < kRows; ++r) {
    const auto grid = textbook::AbsmaxGrid(testing::Row(problem_.w, r), 4, true, 0);
    ASSERT_EQ(static_cast<double>(fit->grid.scale[static_cast<size_t>(r)]), grid.scale[0]);
  }
  {
    SCOPED_TRACE("OPTQ");
    CheckSweep(*fit, false);
    CheckCertificate(*fit, Method::kOptq);
  }
  SCOPED_TRACE("Qronos");
  spec_.method = Method::kQronos;
  const MethodInput input{spec_, layer_, seconds_};
  const absl::Status status = Qronos(input, *fit, context_);
  ASSERT_TRUE(status.ok()) << status;
  CheckSweep(*fit, true);
  CheckCertificate(*fit, Method::kQronos);
}

TEST_P(EverySize, RoundsToTheNearestLevel) {
  spec_.method = Method::kNearest;
  RoundedLayer rounded;
  rounded.grid = MakeGrid(spec_, kRows, n_, {});
  FillQuantParams(spec_, layer_.weights(), context_, rounded.grid);
  const std::vector<RowReach> reaches =
      RoundAlone(spec_, layer_, input_norm_, nullptr, context_, rounded);
  for (int64_t r = 0; r < kRows; ++r) {
    const std::vector<double> w = testing::Row(problem_.w, r);
    const auto grid = textbook::AbsmaxGrid(w, 4, true, 0);
    double reach = 0;
    for (int64_t j = 0; j < n_; ++j) {
      const double v = w[static_cast<size_t>(j)];
      const int code = rounded.codes[static_cast<size_t>(r * n_ + j)];
      ASSERT_EQ(code, grid.Code(j, v));
      reach += std::max(grid.scale[0] / 2, std::abs(v - grid.Level(j, code))) *
               input_norm_[static_cast<size_t>(j)];
    }
    EXPECT_NEAR(reaches[static_cast<size_t>(r)].weighted, reach, 1e-6 * reach);
  }
  // The bound's sigma_max costs another factorisation.
  if (n_ == 4096) return;
  auto nearest = RunMethod(spec_, layer_, 0, {}, context_, seconds_);
  ASSERT_TRUE(nearest.ok()) << nearest.status();
  EXPECT_EQ(nearest->codes, rounded.codes);
  CheckCertificate(*nearest, Method::kNearest);
}

// Up to 65 features the textbook, which takes N^4, runs on its own.
class SmallSize : public EverySize {};

TEST_P(SmallSize, IsTheTextbookFromTokensToCodes) {
  for (const Method method : {Method::kOptq, Method::kQronos}) {
    spec_.method = method;
    const double lambda = 0.01 * MeanDiagonal(layer_.statistics().gram);
    const auto fit = RunMethod(spec_, layer_, lambda, {}, context_, seconds_);
    ASSERT_TRUE(fit.ok()) << fit.status();
    textbook::Matrix h = textbook::Gram(problem_.x_quantized);
    textbook::Matrix g = textbook::CrossGram(problem_.x_quantized, problem_.x);
    for (int64_t j = 0; j < n_; ++j) {
      h(j, j) += lambda;
      g(j, j) += lambda;
    }
    textbook::Matrix u;
    std::vector<double> d;
    ASSERT_TRUE(textbook::ReverseFactor(h, u, d));
    int64_t forked = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      const std::vector<double> w = testing::Row(problem_.w, r);
      const auto grid = textbook::AbsmaxGrid(w, 4, true, 0);
      const auto truth =
          method == Method::kOptq ? textbook::Optq(w, u, grid) : textbook::Qronos(w, h, g, grid);
      for (int64_t j = 0; j < n_; ++j) {
        const auto at = static_cast<size_t>(j);
        if (fit->codes[static_cast<size_t>(r * n_ + j)] == truth.codes[at]) continue;
        // The sums' 1e-6 times the conditioning that lambda = trace / 100 N leaves.
        const double position = truth.target[at] / grid.scale[0];
        EXPECT_LE(std::abs(position - std::floor(position) - 0.5), 1e-3) << r << " " << j;
        ++forked;
        break;
      }
    }
    EXPECT_LE(forked, 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Features, SmallSize,
                         ::testing::Values(1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65),
                         ::testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(Features, EverySize,
                         ::testing::Values(1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 576, 1536, 4096),
                         ::testing::PrintToStringParamName());

}  // namespace
}  // namespace certiq::engine
