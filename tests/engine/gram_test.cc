#include "engine/gram/gram.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "base/status.h"
#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

using testing::Accumulate;
using testing::Inputs;
using testing::MakeLayer;

// The promise of statistics.h: |error of H_ij| <= 15 2^-24 sqrt(H_ii H_jj), and below the 1e-6
// that everything else relies on.
constexpr double kPromise = 15 * 0x1p-24;
static_assert(kPromise < 1e-6);

void ExpectMatchesTruth(const textbook::Matrix& x, const Statistics& sums) {
  const textbook::Matrix truth = textbook::Gram(x);
  ASSERT_EQ(sums.features(), x.cols);
  ASSERT_EQ(sums.tokens, x.rows);
  for (int64_t i = 0; i < x.cols; ++i) {
    for (int64_t j = i; j < x.cols; ++j) {
      ASSERT_LE(std::abs(sums.gram.at(i, j) - truth(i, j)),
                kPromise * std::sqrt(truth(i, i) * truth(j, j)))
          << "entry " << i << ", " << j << " of " << x.rows << " x " << x.cols;
    }
  }
}

bool BitIdentical(const Statistics& a, const Statistics& b) {
  for (int64_t i = 0; i < a.features(); ++i) {
    for (int64_t j = i; j < a.features(); ++j) {
      if (a.gram.at(i, j) != b.gram.at(i, j)) return false;
    }
  }
  return a.tokens == b.tokens;
}

TEST(StatisticsTest, MatchesTextbookAtOddShapes) {
  for (const int64_t features : {1, 2, 7, 31, 32, 33, 127, 128, 129, 200}) {
    for (const int64_t tokens : {1, 7, 8, 9, 31, 33, 129, 255, 257, 511, 512, 513, 600}) {
      const auto x = MakeLayer(tokens, features, 1, Inputs::kGaussian, 7).x;
      ExpectMatchesTruth(x, Accumulate(x));
    }
  }
}

TEST(StatisticsTest, MatchesTextbookOnHardInputs) {
  for (const Inputs inputs :
       {Inputs::kCorrelated, Inputs::kRankDeficient, Inputs::kIllConditioned}) {
    const auto x = MakeLayer(700, 70, 1, inputs, 11).x;
    ExpectMatchesTruth(x, Accumulate(x));
  }
}

// One token so large that every later square is lost at half an ulp of a
// float32 sum: long float32 chains would be off by more than 1e-6.
TEST(StatisticsTest, KeepsSmallTokensBesideAMassiveOne) {
  textbook::Matrix x(256, 3);
  for (double& v : x.values) v = 1;
  for (int64_t j = 0; j < 3; ++j) x(0, j) = 4096;
  ExpectMatchesTruth(x, Accumulate(x));
}

// Equal tokens round the same way every time: nothing averages out.
TEST(StatisticsTest, EqualTokensStayWithinThePromise) {
  for (const double value : {0.1, 0.7, 1.9}) {
    textbook::Matrix x(2048, 40);
    for (int64_t t = 0; t < x.rows; ++t) {
      for (int64_t j = 0; j < x.cols; ++j) {
        x(t, j) = static_cast<float>(value * (1 + 0.01 * static_cast<double>(j)));
      }
    }
    ExpectMatchesTruth(x, Accumulate(x));
  }
}

TEST(StatisticsTest, SumsAndOrdersAreExact) {
  const textbook::Matrix a = MakeLayer(70, 150, 1, Inputs::kGaussian, 21).x;
  const textbook::Matrix b = MakeLayer(90, 150, 1, Inputs::kCorrelated, 22).x;
  testing::ContraryExecutor executor;
  const Statistics sum = Sum(Accumulate(a), Accumulate(b), executor);
  Statistics merged = Accumulate(a);
  Merge(Accumulate(b), merged);
  EXPECT_TRUE(BitIdentical(sum, merged));
  std::vector<int64_t> order(150);
  for (int64_t i = 0; i < 150; ++i) order[static_cast<size_t>(i)] = i * 7 % 150;
  const Statistics permuted = Permute(sum, order, executor);
  for (int64_t i = 0; i < 150; ++i) {
    for (int64_t j = i; j < 150; ++j) {
      const int64_t p = order[static_cast<size_t>(i)];
      const int64_t q = order[static_cast<size_t>(j)];
      ASSERT_EQ(permuted.gram.at(i, j), sum.gram.at(std::min(p, q), std::max(p, q)));
    }
  }
}

TEST(StatisticsTest, SquaresBeyondFloat32AreExactEnough) {
  textbook::Matrix x = MakeLayer(300, 6, 1, Inputs::kGaussian, 3).x;
  const double magnitude[] = {0x1p120, 0x1p-120, 1, 0x1p60, 0x1p-70, 0x1p-149};
  for (int64_t t = 0; t < x.rows; ++t) {
    for (int64_t j = 0; j < x.cols; ++j) {
      x(t, j) = static_cast<float>(j == 5 ? magnitude[j] : x(t, j) * magnitude[j]);
    }
  }
  ExpectMatchesTruth(x, Accumulate(x));
}

TEST(StatisticsTest, DependsOnNeitherChunksNorThreads) {
  const auto x = MakeLayer(1000, 150, 1, Inputs::kCorrelated, 5).x;
  const Statistics whole = Accumulate(x, 1000);
  EXPECT_TRUE(BitIdentical(whole, Accumulate(x, 1)));
  EXPECT_TRUE(BitIdentical(whole, Accumulate(x, 97)));

  testing::ContraryExecutor contrary;
  StatisticsAccumulator threaded(150);
  const std::vector<float> values(x.values.begin(), x.values.end());
  ASSERT_TRUE(threaded
                  .Append({DType::kF32, reinterpret_cast<const std::byte*>(values.data()), "x"}, 0,
                          1000, contrary)
                  .ok());
  EXPECT_TRUE(BitIdentical(whole, std::move(threaded).Finish(contrary)));
}

TEST(StatisticsTest, RefusesNonFiniteValuesWithTheirPosition) {
  SerialExecutor executor;
  StatisticsAccumulator sums(3);
  std::vector<float> rows(6, 1.0f);
  const auto* bytes = reinterpret_cast<const std::byte*>(rows.data());
  ASSERT_TRUE(sums.Append({DType::kF32, bytes, "x"}, 0, 2, executor).ok());
  rows[4] = NAN;
  const absl::Status status = sums.Append({DType::kF32, bytes, "x"}, 2, 2, executor);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(base::FieldOf(status), "x");
  EXPECT_NE(std::string(status.message()).find("row 3, column 1"), std::string::npos) << status;
}

}  // namespace
}  // namespace certiq::engine
