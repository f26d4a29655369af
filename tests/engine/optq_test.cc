// The engine's OPTQ against the textbook's, code by code.

#include "engine/methods/optq.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Inputs;

struct Shape {
  int64_t tokens;
  int64_t features;
  int64_t rows;
};

// Recovers the codes of a dense result.
std::vector<int> Codes(const QuantizedLayer& layer, const textbook::RowGrid& grid, int64_t row,
                       int64_t features) {
  const std::vector<double> weight = testing::TensorValues(layer, "weight");
  std::vector<int> codes;
  for (int64_t j = 0; j < features; ++j) {
    const double level = weight[static_cast<size_t>(row * features + j)];
    codes.push_back(static_cast<int>(
        std::lround(level / grid.scale[grid.GroupOf(j)] + grid.zero[grid.GroupOf(j)])));
  }
  return codes;
}

// The sweep runs in float32 with sums over k < j of |change_k U_kj|, so a
// target may be off by gamma = 2 (j + 2) 2^-24 times the sum of magnitudes (Higham, 3.1), U
// in float32 included. Codes may differ only where the textbook's target lies that close to
// a tie; after such a row went its own way nothing more is said of it.
void ExpectCodesAgree(const testing::RandomLayer& problem, const ResolvedSpec& spec,
                      int64_t* forked) {
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok()) << layer.status();
  textbook::Matrix h = textbook::Gram(problem.x);
  for (int64_t j = 0; j < h.rows; ++j) h(j, j) += layer->certificate.lambda_used;
  textbook::Matrix u;
  std::vector<double> d;
  ASSERT_TRUE(textbook::ReverseFactor(h, u, d));
  for (int64_t r = 0; r < problem.w.rows; ++r) {
    const std::vector<double> w = testing::Row(problem.w, r);
    const auto grid = textbook::AbsmaxGrid(w, spec.bits, spec.symmetric, spec.group_size);
    const textbook::RoundedRow truth = textbook::Optq(w, u, grid);
    const std::vector<int> codes = Codes(*layer, grid, r, problem.w.cols);
    for (int64_t j = 0; j < problem.w.cols; ++j) {
      const auto at = static_cast<size_t>(j);
      if (codes[at] == truth.codes[at]) continue;
      double sum = std::abs(w[at]);
      for (int64_t k = 0; k < j; ++k) {
        sum +=
            std::abs((w[static_cast<size_t>(k)] - truth.level[static_cast<size_t>(k)]) * u(k, j));
      }
      const double step = grid.scale[grid.GroupOf(j)];
      // The factor inherits the statistics' 1e-6, so the targets do, too.
      const double slack = (2.0 * (static_cast<double>(j) + 2) * 0x1p-24 + 1e-5) * sum;
      const double position = truth.target[at] / step;
      const double to_tie = std::abs(position - std::floor(position) - 0.5) * step;
      ASSERT_LE(to_tie, slack) << "row " << r << ", feature " << j << ": code " << codes[at]
                               << ", expected " << truth.codes[at];
      ++*forked;
      break;
    }
  }
}

TEST(OptqTest, MatchesTextbookAtOddShapes) {
  int64_t forked = 0;
  int64_t rows = 0;
  for (const Shape shape :
       {Shape{4, 1, 1}, Shape{9, 2, 3}, Shape{40, 9, 1}, Shape{40, 8, 33}, Shape{200, 63, 5},
        Shape{200, 64, 2}, Shape{200, 65, 70}, Shape{300, 127, 3}, Shape{300, 128, 3},
        Shape{300, 129, 3}, Shape{500, 300, 20}}) {
    ExpectCodesAgree(testing::MakeLayer(shape.tokens, shape.features, shape.rows,
                                        Inputs::kCorrelated, 43 + shape.features),
                     {}, &forked);
    rows += shape.rows;
  }
  EXPECT_LE(forked, rows / 20) << "ties are rare in random data";
}

TEST(OptqTest, MatchesTextbookForEveryGrid) {
  const auto problem = testing::MakeLayer(300, 150, 9, Inputs::kCorrelated, 47);
  int64_t forked = 0;
  for (int bits = 2; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      for (const int group : {0, 32, 40, 64, 128, 200}) {
        ResolvedSpec spec;
        spec.bits = bits;
        spec.symmetric = symmetric;
        spec.group_size = group;
        ExpectCodesAgree(problem, spec, &forked);
      }
    }
  }
  EXPECT_LE(forked, 9 * 84 / 20);
}

TEST(OptqTest, MatchesTextbookOnSingularAndIllConditionedInputs) {
  for (const Inputs inputs : {Inputs::kRankDeficient, Inputs::kIllConditioned}) {
    int64_t forked = 0;
    ResolvedSpec spec;
    spec.damping_value = 0.1;
    ExpectCodesAgree(testing::MakeLayer(80, 140, 12, inputs, 53), spec, &forked);
    EXPECT_LE(forked, 2);
  }
}

TEST(OptqTest, IsPlainRoundingWhenDampingIsHuge) {
  const auto problem = testing::MakeLayer(100, 40, 8, Inputs::kGaussian, 59);
  ResolvedSpec spec;
  spec.damping_rule = DampingRule::kAbsolute;
  spec.damping_value = 1e12;
  spec.compare_nearest = true;
  const auto layer = testing::Quantize(problem, spec);
  ASSERT_TRUE(layer.ok());
  for (int64_t r = 0; r < 8; ++r) {
    const std::vector<double> w = testing::Row(problem.w, r);
    const auto grid = textbook::AbsmaxGrid(w, 4, true, 0);
    const std::vector<int> codes = Codes(*layer, grid, r, 40);
    for (int64_t j = 0; j < 40; ++j) {
      EXPECT_EQ(codes[static_cast<size_t>(j)], grid.Code(j, w[static_cast<size_t>(j)]));
    }
  }
  EXPECT_NEAR(layer->certificate.relative_error, *layer->certificate.nearest_relative_error,
              1e-5 * layer->certificate.relative_error);
}

}  // namespace
}  // namespace certiq::engine
