// The best step for nearest rounding where the metric is diagonal (S3, S5).

#ifndef CERTIQ_ENGINE_SCALE_SEARCH_H_
#define CERTIQ_ENGINE_SCALE_SEARCH_H_

#include <cstdint>
#include <vector>

#include "engine/aligned.h"
#include "engine/grid.h"
#include "engine/spec.h"

namespace certiq::engine {

// The diagonal of a metric M, one entry a feature: D of (M1) for (S5), |X~_j|^2, or ones.
class DiagonalMetric {
 public:
  DiagonalMetric() = default;
  // REQUIRES: finite, none negative.
  explicit DiagonalMetric(std::vector<double> values);

  // M_jj from feature `first` on, and the same over the largest of all in float32; readable for
  // kPadding features beyond the last.
  const double* exact(int64_t first) const { return exact_.data() + first; }
  const float* scaled(int64_t first) const { return scaled_.data() + first; }
  static constexpr int64_t kPadding = 32;
  // The largest of all, or 1 where all are zero.
  double unit() const { return unit_; }

 private:
  std::vector<double> exact_;
  AlignedVector<float> scaled_;
  double unit_ = 1;
};

// Finds, for rows or groups one after another, the step that minimises
//   F(s, z) = sum_j M_jj (w_j - s k_j)^2, k_j = clip(rint(w_j / s), -z, 2^bits - 1 - z),
// over every positive scale s that spec.scale_dtype holds and, for an asymmetric grid, every zero
// point z in 0 ... 2^bits - 1; a symmetric one has z = 2^(bits - 1). It is the global minimum, up
// to float64's rounding of F. With a diagonal metric F is continuous in s: at a tie either code is
// as good. Levels count as evenly spaced, whatever type they are stored in.
//
// How: on an interval of scales the codes only shrink as s grows, and F is a minimum of quadratics
// in s, each of curvature at most 2 b_1, b_1 = sum_j M_jj k_j(s_1)^2 at the lower end s_1. So F -
// b_1 s^2 is concave and lies above its chord:
//   F(s) >= F(s_1) + (s - s_1) (F(s_2) - F(s_1)) / h - b_1 (s - s_1)(s_2 - s), h = s_2 - s_1.
// For a range of zero points the codes may be clipped to the union of what they allow, which makes
// no F larger. Intervals whose bound is above the best scale known are dropped; others are halved,
// until they hold so few breakpoints |w_j| / (t - 1/2) that these are sorted and F, now a
// quadratic c - 2 s a + s^2 b between two of them, is minimised there (S3). Of zero points only
// those count that clip no more on one side than the weights need on the other: a z above
// rint(-min w / s) may come down to it, and likewise from below, and no F grows.
// Evaluations are float32, at most `Tolerance` off, which the comparison of bounds allows for; what
// decides in the end is float64.
//
// Keeps its buffers; not thread-safe.
class ScaleSearch {
 public:
  explicit ScaleSearch(const ResolvedSpec& spec);

  // `first` is the feature of the metric that weights[0] belongs to. Where M or w is all zero, or
  // where the type cannot hold the scale of (S1): the step of (S1). REQUIRES: count >= 1.
  Step Find(const float* weights, int64_t count, const DiagonalMetric& metric, int64_t first);

  // Evaluations of F and intervals searched exactly so far, for benchmarks and tests.
  int64_t evaluations() const { return evaluations_; }
  int64_t finished() const { return finished_; }

 private:
  // F and b of one scale, in units of unit_^2 and the largest M.
  struct Value {
    double error = 0;
    double energy = 0;
  };
  // Scales [low, high] and zero points [first_zero, last_zero].
  struct Node {
    double bound = 0;
    double low = 0;
    double high = 0;
    int32_t first_zero = 0;
    int32_t last_zero = 0;
    Value at_low;
    Value at_high;
  };
  // For a heap whose front has the least bound.
  static bool Later(const Node& a, const Node& b) { return a.bound > b.bound; }
  // Where breakpoints are crossed: as the scale passes it upwards, |k| falls from `code`.
  struct Event {
    double scale;
    int32_t feature;
    int32_t code;

    bool operator<(const Event& other) const {
      if (scale != other.scale) return scale < other.scale;
      return feature != other.feature ? feature < other.feature : code > other.code;
    }
  };

  void Load(const float* weights, int64_t count);
  Value Evaluate(double scale, int32_t first_zero, int32_t last_zero);
  // The part of the zero points that matters from scale `low` on; false where there is none.
  bool NarrowZeros(double low, int32_t& first_zero, int32_t& last_zero) const;
  // Adds a node unless its bound tells that it cannot hold the best; known values are given.
  void Push(double low, double high, int32_t first_zero, int32_t last_zero, const Value* at_low,
            const Value* at_high);
  void Split(const Node& node);
  bool IsSmall(const Node& node) const;
  // The exact minimum on a node of one zero point.
  void Finish(const Node& node);
  void Offer(double scale, double error, int32_t zero);

  const ResolvedSpec& spec_;
  const int32_t top_;
  // Of the row at hand.
  int64_t count_ = 0;
  const float* row_ = nullptr;
  const float* metric_ = nullptr;
  const double* exact_ = nullptr;
  double metric_unit_ = 1;
  // A power of two, so that weights / unit_ lie in [-1, 1].
  double unit_ = 1;
  double low_ = 0;
  double high_ = 0;
  // sum_j M_jj w_j^2.
  double all_ = 0;
  AlignedVector<float> weights_;
  std::vector<float> codes_;
  std::vector<Event> events_;
  std::vector<Node> heap_;
  // The least F known of any single step, in Value's units.
  double least_ = 0;
  // From Finish alone: F in the weights' own units.
  double best_error_ = 0;
  Step best_;
  int64_t evaluations_ = 0;
  int64_t finished_ = 0;
};

// The largest finite value of the type that is at most x, and the least that is at least x, for
// finite x >= 0; infinity where there is none. Only kF32, kF16, kBF16.
double RepresentableBelow(DType dtype, double x);
double RepresentableAbove(DType dtype, double x);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SCALE_SEARCH_H_
