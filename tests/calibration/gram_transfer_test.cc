#include "calibration/gram_transfer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "support/text.h"

namespace certiq::server {
namespace {

constexpr int64_t kFeatures = 7;
constexpr int64_t kTokens = 50;

// What a client would sum, in float64: [features, features] each, row-major.
struct Sums {
  std::vector<double> x, quantized, cross;
};

Sums SumsOf(const std::vector<double>& x, const std::vector<double>& quantized) {
  const auto product = [](const std::vector<double>& a, const std::vector<double>& b) {
    std::vector<double> sums(kFeatures * kFeatures);
    for (size_t t = 0; t < kTokens; ++t) {
      for (size_t i = 0; i < kFeatures; ++i) {
        for (size_t j = 0; j < kFeatures; ++j) {
          sums[i * kFeatures + j] += a[t * kFeatures + i] * b[t * kFeatures + j];
        }
      }
    }
    return sums;
  };
  return {product(x, x), product(quantized, quantized), product(quantized, x)};
}

struct Tokens {
  Tokens() : x(kTokens * kFeatures), quantized(x.size()), p(x.size()) {
    std::mt19937 generator(7);
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = normal(generator);
      p[i] = 0.1 * normal(generator);
      quantized[i] = x[i] - p[i];
    }
  }
  std::vector<double> x, quantized, p;
};

void AddSymmetric(const std::vector<double>& matrix, MatrixLayout layout,
                  std::vector<double>& values) {
  for (size_t i = 0; i < kFeatures; ++i) {
    for (size_t j = layout == MatrixLayout::kUpper ? i : 0; j < kFeatures; ++j) {
      values.push_back(matrix[i * kFeatures + j]);
    }
  }
}

std::vector<double> Sent(const Sums& sums, bool mismatched, MatrixLayout layout) {
  std::vector<double> values;
  AddSymmetric(sums.x, layout, values);
  if (!mismatched) return values;
  AddSymmetric(sums.quantized, layout, values);
  values.insert(values.end(), sums.cross.begin(), sums.cross.end());
  return values;
}

std::vector<std::byte> Bytes(const std::vector<double>& values, engine::DType dtype) {
  const auto copy = [](const auto& from) {
    const auto bytes = std::as_bytes(std::span(from));
    return std::vector<std::byte>(bytes.begin(), bytes.end());
  };
  if (dtype == engine::DType::kF64) return copy(values);
  std::vector<float> narrow(values.size());
  std::transform(values.begin(), values.end(), narrow.begin(),
                 [](double value) { return static_cast<float>(value); });
  return copy(narrow);
}

class StatisticsTransferTest
    : public ::testing::TestWithParam<std::tuple<bool, MatrixLayout, engine::DType>> {
 protected:
  bool mismatched() const { return std::get<0>(GetParam()); }
  MatrixLayout layout() const { return std::get<1>(GetParam()); }
  engine::DType dtype() const { return std::get<2>(GetParam()); }
  StatisticsImport Import() const {
    return StatisticsImport(kFeatures, mismatched(), dtype(), layout());
  }
  std::vector<double> Good() const {
    return Sent(SumsOf(tokens_.x, tokens_.quantized), mismatched(), layout());
  }
  // Where the values, sent whole, are refused, and how.
  std::string Refusal(const std::vector<double>& values) const {
    StatisticsImport import = Import();
    absl::Status status = import.Append(Bytes(values, dtype()));
    if (status.ok()) status = import.Finish(kTokens).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  }

  const Tokens tokens_;
};

TEST_P(StatisticsTransferTest, WhatGoesInComesOut) {
  const std::vector<double> good = Good();
  const double tolerance = dtype() == engine::DType::kF64 ? 1e-12 : 1e-5;
  const std::vector<std::byte> bytes = Bytes(good, dtype());
  const auto item = static_cast<size_t>(engine::ItemSize(dtype()));
  for (const size_t elements : {size_t{1}, size_t{3}, good.size()}) {
    StatisticsImport import = Import();
    for (size_t at = 0; at < bytes.size(); at += elements * item) {
      ASSERT_TRUE(
          import.Append(std::span(bytes).subspan(at, std::min(elements * item, bytes.size() - at)))
              .ok());
    }
    auto sums = import.Finish(kTokens);
    ASSERT_TRUE(sums.ok()) << sums.status();
    EXPECT_EQ(sums->tokens, kTokens);
    EXPECT_EQ(sums->mismatch.has_value(), mismatched());
    StatisticsExport out(std::make_shared<const engine::Statistics>(*std::move(sums)), kFeatures,
                         mismatched(), layout());
    std::vector<double> all;
    std::vector<double> next;
    for (out.Next(4, next); !next.empty(); out.Next(4, next)) {
      all.insert(all.end(), next.begin(), next.end());
    }
    ASSERT_EQ(all.size(), good.size());
    for (size_t i = 0; i < all.size(); ++i) EXPECT_NEAR(all[i], good[i], kTokens * tolerance);
  }
}

// P^T P and P^T X~ from what clients send are those of the tokens.
TEST_P(StatisticsTransferTest, DifferencesAreThoseOfTheTokens) {
  if (!mismatched()) return;
  StatisticsImport import = Import();
  ASSERT_TRUE(import.Append(Bytes(Good(), dtype())).ok());
  const auto sums = import.Finish(kTokens);
  ASSERT_TRUE(sums.ok()) << sums.status();
  const double tolerance = kTokens * (dtype() == engine::DType::kF64 ? 1e-12 : 1e-5);
  const Sums expected = SumsOf(tokens_.p, tokens_.quantized);
  for (int64_t i = 0; i < kFeatures; ++i) {
    for (int64_t j = 0; j < kFeatures; ++j) {
      const auto at = static_cast<size_t>(i * kFeatures + j);
      const auto transposed = static_cast<size_t>(j * kFeatures + i);
      // It is X~^T P that SumsOf gives.
      EXPECT_NEAR(sums->mismatch->cross[at], expected.cross[transposed], tolerance);
      if (j < i) continue;
      EXPECT_NEAR(sums->mismatch->residual.at(i, j), expected.x[at], tolerance);
      EXPECT_NEAR(sums->gram.at(i, j), expected.quantized[at], tolerance);
    }
  }
}

TEST_P(StatisticsTransferTest, RefusalsSayWhere) {
  const std::vector<double> good = Good();
  std::vector<double> bad = good;
  bad[2] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_CONTAINS(Refusal(bad), "X^T X, row 0, column 2");
  bad[2] = std::numeric_limits<double>::infinity();
  EXPECT_CONTAINS(Refusal(bad), "row 0, column 2");
  bad = good;
  bad[0] = -1;
  EXPECT_CONTAINS(Refusal(bad), "row 0, column 0");
  bad = good;
  const bool full = layout() == MatrixLayout::kFull;
  const double beyond = 1.01 * std::sqrt(good[0] * good[full ? kFeatures + 1 : kFeatures]);
  bad[1] = beyond;
  if (full) bad[kFeatures] = beyond;
  EXPECT_CONTAINS(Refusal(bad), "sqrt(H_ii H_jj)");
  EXPECT_CONTAINS(Refusal(bad), "row 0, column 1");
  if (full) {
    bad = good;
    bad[kFeatures] += 1e-3 * good[0];
    EXPECT_CONTAINS(Refusal(bad), "symmetric");
    EXPECT_CONTAINS(Refusal(bad), "row 1, column 0");
  }
  bad = good;
  bad.pop_back();
  EXPECT_CONTAINS(Refusal(bad), "the stream ended in");
  bad = good;
  bad.push_back(0);
  EXPECT_CONTAINS(Refusal(bad), "no more bytes");

  StatisticsImport import = Import();
  EXPECT_TRUE(absl::IsInvalidArgument(import.Append({})));
  EXPECT_TRUE(absl::IsInvalidArgument(import.Append(std::vector<std::byte>(9))));
}

TEST_P(StatisticsTransferTest, NothingIsZeros) {
  StatisticsExport out(nullptr, kFeatures, mismatched(), layout());
  std::vector<double> values;
  out.Next(1 << 20, values);
  EXPECT_EQ(values, std::vector<double>(Good().size(), 0.0));
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, StatisticsTransferTest,
    ::testing::Combine(::testing::Bool(),
                       ::testing::Values(MatrixLayout::kFull, MatrixLayout::kUpper),
                       ::testing::Values(engine::DType::kF64, engine::DType::kF32)));

}  // namespace
}  // namespace certiq::server
