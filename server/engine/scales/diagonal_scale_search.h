// Exact search of scale and zero point under a diagonal metric (S3, S5).

#ifndef CERTIQ_ENGINE_SCALES_DIAGONAL_SCALE_SEARCH_H_
#define CERTIQ_ENGINE_SCALES_DIAGONAL_SCALE_SEARCH_H_

#include <cstdint>
#include <vector>

#include "engine/kernels/aligned.h"
#include "engine/scales/qparams.h"
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

// Finds, for rows or groups one after another, the scale and zero point that minimise
//   F(s, z) = sum_j M_jj (w_j - s k_j)^2, k_j = clip(rint(w_j / s), -z, 2^bits - 1 - z),
// over every positive scale s that spec.scale_dtype holds and every zero point z that is allowed: 0
// ... 2^bits - 1 for an asymmetric grid, 2^(bits - 1) for a symmetric one, or with signed scales
// that and its mirror image. It is the global minimum, up
// to float64's rounding of F. With a diagonal metric F is continuous in s: at a tie either code is
// as good. Levels count as evenly spaced, whatever type they are stored in.
//
// How: on an interval of scales the codes only shrink as s grows, and F is a minimum of quadratics
// in s, each of curvature at most 2 b_1, b_1 = sum_j M_jj k_j(s_1)^2 at the lower end s_1. So F -
// b_1 s^2 is concave and lies above its chord:
//   F(s) >= F(s_1) + (s - s_1) (F(s_2) - F(s_1)) / h - b_1 (s - s_1)(s_2 - s), h = s_2 - s_1.
// For a range of zero points the codes may be clipped to the union of what they allow, which makes
// no F larger; two zero points are evaluated side by side, each with its own bound. Intervals whose
// bound is above the best scale known are dropped; others are halved,
// until they hold so few breakpoints |w_j| / (t - 1/2) that these are sorted and F, now a
// quadratic c - 2 s a + s^2 b between two of them, is minimised there (S3). Of zero points only
// those count that clip no more on one side than the weights need on the other: a z above
// rint(-min w / s) may come down to it, and likewise from below, and no F grows.
// Evaluations are float32, at most `Tolerance` off, which the comparison of bounds allows for; what
// decides in the end is float64.
//
// Keeps its buffers; not thread-safe.
class DiagonalScaleSearch {
 public:
  explicit DiagonalScaleSearch(const ResolvedSpec& spec);

  // `first` is the feature of the metric that weights[0] belongs to. Where M or w is all zero, or
  // where the type cannot hold the scale of (S1): the scale of (S1). REQUIRES: count >= 1.
  QuantParams Find(const float* weights, int64_t count, const DiagonalMetric& metric,
                   int64_t first);

  // Evaluations of F and intervals searched exactly so far, for benchmarks and tests.
  int64_t evaluations() const { return evaluations_; }
  int64_t finished() const { return finished_; }

 private:
  // F and b of one scale, in units of unit_^2 and the largest M.
  struct Value {
    double error = 0;
    double energy = 0;
  };
  // Zero points [first, last]. For the node's scales every zero point that is allowed has one in
  // [least, most] that loses nothing against it; other nodes of the same scales have the rest of
  // these.
  struct Zeros {
    int32_t first = 0;
    int32_t last = 0;
    int32_t least = 0;
    int32_t most = 0;

    int32_t count() const { return last - first + 1; }
  };
  // What is known at one scale of zero points [first, last]: of one or two of them the value of
  // each, of more what their union gives, twice.
  struct Values {
    int32_t first = 0;
    int32_t last = 0;
    Value of_first;
    Value of_last;
  };
  // Scales [low, high] and zero points, with a bound for each of two zero points.
  struct Node {
    double bound_first = 0;
    double bound_last = 0;
    double low = 0;
    double high = 0;
    Zeros zeros;
    Values at_low;
    Values at_high;
  };
  // An entry of a heap whose front has the least bound, and its place in nodes_.
  struct Entry {
    double bound;
    size_t node;

    static bool Later(const Entry& a, const Entry& b) { return a.bound > b.bound; }
  };
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
  Values Evaluate(double scale, const Zeros& zeros);
  // Values of kRanges ranges of codes, from lowest to highest.
  template <int kRanges>
  void Sum(double scale, const float* lowest, const float* highest, Value* values) const;
  // The part of `known` that is about these zero points, or else evaluated.
  Values Select(const Values* known, double scale, const Zeros& zeros);
  // Below every F between two scales `width` apart, in Value's units.
  double Bound(const Value& at_low, const Value& at_high, double width) const;
  // The part of the zero points that matters from scale `low` on; false where there is none.
  bool NarrowZeros(double low, Zeros& zeros) const;
  // Adds a node unless its bound tells that it cannot hold the best; known values are given.
  void Push(double low, double high, const Zeros& zeros, const Values* at_low,
            const Values* at_high);
  void Split(const Node& node);
  bool IsSmall(const Node& node) const;
  // The exact minimum over scales [low, high] with one zero point.
  void Finish(double low, double high, int32_t zero);
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
  std::vector<int32_t> codes_;
  std::vector<Event> events_;
  std::vector<Node> nodes_;
  std::vector<Entry> heap_;
  // The least F known of any single scale, in Value's units.
  double least_ = 0;
  // From Finish alone: F in the weights' own units.
  double best_error_ = 0;
  QuantParams best_;
  int64_t evaluations_ = 0;
  int64_t finished_ = 0;
};

// The largest finite value of the type that is at most x, and the least that is at least x, for
// finite x >= 0; infinity where there is none. Only kF32, kF16, kBF16.
double RepresentableBelow(DType dtype, double x);
double RepresentableAbove(DType dtype, double x);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SCALES_DIAGONAL_SCALE_SEARCH_H_
