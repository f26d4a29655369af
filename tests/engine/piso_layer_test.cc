// PiSO from a layer's tokens to its scales, against every scale and zero point there is, in float64
// from tokens and weights.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "engine/certificate.h"
#include "engine/quantize_layer.h"
#include "engine/scales/diagonal_scale_search.h"
#include "tests/engine/problems.h"

namespace certiq::engine {
namespace {

constexpr int kBits = 2;
constexpr ScaleObjective kObjectives[] = {ScaleObjective::kInputs, ScaleObjective::kQuantizedInputs,
                                          ScaleObjective::kMixed, ScaleObjective::kDataFree};

testing::RandomLayer MakeLayer(int64_t features, int64_t rows, uint64_t seed) {
  testing::RandomLayer layer =
      testing::MakeLayer(3 * features, features, rows, testing::Inputs::kCorrelated, seed);
  layer.x_quantized = testing::Disturbed(layer.x, 0.3, seed + 1);
  return layer;
}

// What a layer was given and what came back, by row and group.
struct Result {
  std::vector<double> weight;
  std::vector<double> scales;
  std::vector<double> zeros;
  double lambda = 0;
};

Result Quantized(const testing::RandomLayer& layer, const ResolvedSpec& spec) {
  const auto made = testing::Quantize(layer, spec);
  EXPECT_TRUE(made.ok()) << made.status();
  if (!made.ok()) return {};
  Result result;
  result.weight = testing::TensorValues(*made, "weight");
  result.scales = testing::TensorValues(*made, "scales");
  result.zeros = testing::TensorValues(*made, "zeros");
  if (result.zeros.empty()) result.zeros.assign(result.scales.size(), 1 << (kBits - 1));
  result.lambda = spec.method == Method::kNearest ? 0 : made->certificate.lambda_used;
  return result;
}

ResolvedSpec Spec(Method method, ScaleObjective objective, bool symmetric) {
  ResolvedSpec spec;
  spec.method = method;
  spec.bits = kBits;
  spec.symmetric = symmetric;
  spec.scale = ScaleRule::kPiso;
  spec.scale_objective = objective;
  // Few enough to try them all.
  spec.scale_dtype = DType::kF16;
  spec.damping_rule = DampingRule::kRelativeTrace;
  spec.damping_value = 0.05;
  return spec;
}

double Level(double w, double scale, double zero) {
  return scale * std::clamp(std::nearbyint(w / scale), -zero, (1 << kBits) - 1 - zero);
}

// What objective says of a row w with q in its place.
double Judge(ScaleObjective objective, const testing::RandomLayer& layer, double lambda,
             const std::vector<double>& w, const std::vector<double>& q) {
  std::vector<double> change = w;
  double plain = 0;
  for (size_t j = 0; j < w.size(); ++j) {
    change[j] -= q[j];
    plain += change[j] * change[j];
  }
  if (objective == ScaleObjective::kDataFree) return plain;
  if (objective == ScaleObjective::kInputs) {
    return textbook::SquaredImage(layer.x, change) + lambda * plain;
  }
  if (objective == ScaleObjective::kQuantizedInputs) {
    return textbook::SquaredImage(layer.x_quantized, change) + lambda * plain;
  }
  double error = lambda * plain;
  for (int64_t t = 0; t < layer.x.rows; ++t) {
    double sum = 0;
    for (int64_t j = 0; j < layer.x.cols; ++j) {
      const auto at = static_cast<size_t>(j);
      sum += layer.x(t, j) * w[at] - layer.x_quantized(t, j) * q[at];
    }
    error += sum * sum;
  }
  return error;
}

// The least of `error` over every scale of float16 that matters for these weights, and every zero
// point.
double Least(const std::vector<double>& w, bool symmetric,
             const std::function<double(double scale, double zero)>& error) {
  double largest = 0;
  for (const double value : w) largest = std::max(largest, std::abs(value));
  double least = std::numeric_limits<double>::infinity();
  for (double scale = RepresentableAbove(DType::kF16, 0.02 * largest); scale < 2.2 * largest;
       scale = RepresentableAbove(DType::kF16, scale * (1 + 1e-9))) {
    for (int zero = symmetric ? 2 : 0; zero <= (symmetric ? 2 : 3); ++zero) {
      least = std::min(least, error(scale, zero));
    }
  }
  return least;
}

// What the sums and the metric in float32 may make an error look like: 1e-6 of all its terms'
// sizes. `w` are the weights from feature `first` on.
double Slack(const testing::RandomLayer& layer, const std::vector<double>& w, int64_t first = 0) {
  double size = 0;
  for (int64_t t = 0; t < layer.x.rows; ++t) {
    double sum = 0;
    for (size_t i = 0; i < w.size(); ++i) {
      const int64_t j = first + static_cast<int64_t>(i);
      sum += (std::abs(layer.x(t, j)) + std::abs(layer.x_quantized(t, j))) * std::abs(w[i]);
    }
    size += sum * sum;
  }
  return 1e-6 * size;
}

// One scale a row: the global optimum, under each objective and with each method (decoupled from
// error feedback).
TEST(PisoLayerTest, IsTheBestOfEveryScaleUnderEachObjective) {
  for (const Method method : {Method::kNearest, Method::kOptq, Method::kQronos}) {
    for (const ScaleObjective objective : kObjectives) {
      for (const bool symmetric : {true, false}) {
        const testing::RandomLayer layer = MakeLayer(7, 4, 3);
        const Result result = Quantized(layer, Spec(method, objective, symmetric));
        ASSERT_EQ(result.scales.size(), 4U);
        for (int64_t r = 0; r < 4; ++r) {
          const std::vector<double> w = testing::Row(layer.w, r);
          const auto error = [&](double scale, double zero) {
            std::vector<double> q;
            q.reserve(w.size());
            for (const double value : w) q.push_back(Level(value, scale, zero));
            return Judge(objective, layer, result.lambda, w, q);
          };
          const auto at = static_cast<size_t>(r);
          EXPECT_LE(error(result.scales[at], result.zeros[at]),
                    Least(w, symmetric, error) + Slack(layer, w))
              << "method " << static_cast<int>(method) << ", objective "
              << static_cast<int>(objective) << ", symmetric " << symmetric << ", row " << r;
        }
      }
    }
  }
}

// Groups. Independent: each the best for its own features. One pass: each the best
// given the codes of those before it. More: the last one is the best given all others' codes.
TEST(PisoLayerTest, GroupsAreTheBestGivenWhatTheyMaySee) {
  constexpr int64_t kGroup = 8;
  constexpr int64_t kFeatures = 21;
  constexpr int64_t kGroups = 3;
  for (const ScaleObjective objective : kObjectives) {
    for (const bool symmetric : {true, false}) {
      for (const int32_t passes : {0, 1, 4}) {
        if (objective == ScaleObjective::kDataFree && passes > 0) continue;
        const testing::RandomLayer layer = MakeLayer(kFeatures, 3, 17);
        ResolvedSpec spec = Spec(Method::kNearest, objective, symmetric);
        spec.group_size = kGroup;
        spec.scale_passes = passes;
        const Result result = Quantized(layer, spec);
        ASSERT_EQ(result.scales.size(), static_cast<size_t>(3 * kGroups));
        for (int64_t r = 0; r < 3; ++r) {
          const std::vector<double> w = testing::Row(layer.w, r);
          for (int64_t g = passes > 1 ? kGroups - 1 : 0; g < kGroups; ++g) {
            const int64_t first = g * kGroup;
            const int64_t end = std::min(first + kGroup, kFeatures);
            // By themselves groups know nothing of the others, not even of their mismatch.
            std::vector<double> seen = w;
            for (int64_t j = 0; j < kFeatures && passes == 0; ++j) {
              if (j < first || j >= end) seen[static_cast<size_t>(j)] = 0;
            }
            std::vector<double> q = seen;
            for (int64_t j = 0; j < first && passes > 0; ++j) {
              q[static_cast<size_t>(j)] = result.weight[static_cast<size_t>(r * kFeatures + j)];
            }
            const auto error = [&](double scale, double zero) {
              for (int64_t j = first; j < end; ++j) {
                const auto at = static_cast<size_t>(j);
                q[at] = Level(w[at], scale, zero);
              }
              return Judge(objective, layer, 0, seen, q);
            };
            const std::vector<double> own(w.begin() + first, w.begin() + end);
            const auto at = static_cast<size_t>(r * kGroups + g);
            EXPECT_LE(error(result.scales[at], result.zeros[at]),
                      Least(own, symmetric, error) + Slack(layer, own, first))
                << "objective " << static_cast<int>(objective) << ", symmetric " << symmetric
                << ", " << passes << " passes, row " << r << ", group " << g;
          }
        }
      }
    }
  }
}

// Interleaved with error feedback: when the sweep reaches a group, its weights are those that with
// all later ones suit what is rounded already best, v* of H v*_>=g = (G w)_>=g - H_>=g,<g q_<g. The
// group's step is the best for them. Of Qronos G is X~^T X + lambda I, of OPTQ it is H.
TEST(PisoLayerTest, InterleavedGroupsAreTheBestForTheUpdatedWeights) {
  constexpr int64_t kGroup = 8;
  constexpr int64_t n = 24;
  for (const Method method : {Method::kOptq, Method::kQronos}) {
    for (const bool symmetric : {true, false}) {
      const testing::RandomLayer layer = MakeLayer(n, 4, 29);
      ResolvedSpec spec = Spec(method, ScaleObjective::kQuantizedInputs, symmetric);
      spec.group_size = kGroup;
      spec.group_scales = GroupScales::kDynamic;
      const Result result = Quantized(layer, spec);
      ASSERT_EQ(result.scales.size(), 12U);
      textbook::Matrix h = textbook::Gram(layer.x_quantized);
      textbook::Matrix g =
          method == Method::kOptq ? h : textbook::CrossGram(layer.x_quantized, layer.x);
      for (int64_t j = 0; j < n; ++j) {
        h(j, j) += result.lambda;
        g(j, j) += result.lambda;
      }
      for (int64_t r = 0; r < 4; ++r) {
        const std::vector<double> w = testing::Row(layer.w, r);
        // The first group's step is found before the sweep, on the weights themselves.
        for (int64_t first = kGroup; first < n; first += kGroup) {
          const int64_t rest = n - first;
          textbook::Matrix trailing(rest, rest);
          std::vector<double> toward(static_cast<size_t>(rest));
          for (int64_t i = 0; i < rest; ++i) {
            for (int64_t j = 0; j < rest; ++j) trailing(i, j) = h(first + i, first + j);
            double& sum = toward[static_cast<size_t>(i)];
            for (int64_t j = 0; j < n; ++j) sum += g(first + i, j) * w[static_cast<size_t>(j)];
            for (int64_t j = 0; j < first; ++j) {
              sum -= h(first + i, j) * result.weight[static_cast<size_t>(r * n + j)];
            }
          }
          const textbook::Matrix inverse = textbook::Inverse(trailing);
          std::vector<double> moved(kGroup);
          textbook::Matrix own(kGroup, kGroup);
          for (int64_t i = 0; i < kGroup; ++i) {
            for (int64_t j = 0; j < rest; ++j) {
              moved[static_cast<size_t>(i)] += inverse(i, j) * toward[static_cast<size_t>(j)];
            }
            for (int64_t j = 0; j < kGroup; ++j) own(i, j) = trailing(i, j);
          }
          const auto error = [&](double scale, double zero) {
            std::vector<double> change = moved;
            for (double& value : change) value -= Level(value, scale, zero);
            return textbook::Form(change, own, change);
          };
          const auto at = static_cast<size_t>(r * (n / kGroup) + first / kGroup);
          EXPECT_LE(error(result.scales[at], result.zeros[at]),
                    Least(moved, symmetric, error) + Slack(layer, moved, first))
              << "method " << static_cast<int>(method) << ", symmetric " << symmetric << ", row "
              << r << ", group " << first / kGroup;
        }
      }
    }
  }
}

}  // namespace
}  // namespace certiq::engine
