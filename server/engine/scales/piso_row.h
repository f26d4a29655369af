// PiSO for one row or group: its best scale and zero point under a full metric (S3).

#ifndef CERTIQ_ENGINE_SCALES_PISO_ROW_H_
#define CERTIQ_ENGINE_SCALES_PISO_ROW_H_

#include <cstdint>
#include <vector>

#include "engine/scales/packed_metric.h"
#include "engine/scales/qparams.h"
#include "engine/spec.h"

namespace certiq::engine {

// One row, or one group of a row, at a time. With q = s k(s, z), k_j = clip(rint(w_j / s), -z,
// 2^bits - 1 - z), it minimises
//   f = (w - q)^T M (w - q) + 2 y^T (w - q) = c - 2 s a + s^2 b,
//   c = w^T M w + 2 y^T w, a = (M w + y)^T k, b = k^T M k,
// over scales s that spec.scale_dtype holds and all zero points z that are allowed. y
// = X~^T P w where inputs are mismatched: then f is |X w - X~ q|^2 less a constant.
//
// The sweep (PiSO, arXiv 2606.10890): k changes at the breakpoints s = |w_i| / (t - 1/2) alone,
// where code i goes from t - 1 to t as s falls. From k = 0 down, a crossing changes a by (M w +
// y)_i sign(w_i) and b by 2 sign(w_i) (M k)_i + M_ii, and M k by a column of M. In between f is a
// quadratic in s. At a breakpoint f jumps and rint may take either code, so scales strictly inside
// an interval are looked at: the one that f's minimum a / b rounds to from either side, or the one
// next to the end. What is found is the global minimum over those, and never worse than the scale
// it starts from. Breakpoints do not depend on M: they are sorted once, and only the (M k)_i at
// their own crossing are needed of M k. So M passes in slices of columns, for all crossings at
// once.
//
// Which breakpoints: for any t >= 0, |M^1/2 (w - q) - t M^1/2 w|^2 >= 0 gives
//   f >= 2 sum_j (t M w + y)_j (w - q)_j - t^2 w^T M w.
// As long as s <= S, sign(w_j) q_j lies in [0, min(S K_j, |w_j| + S / 2)], K_j the largest code on
// the side of w_j; so each term is at least the lesser of its values at both ends, which is a bound
// on f for every s <= S. Where that exceeds f at the start, the rest of the sweep is left out; the
// bound rises as S falls, so S is found by bisection, for each zero point.
//
// float64; M is float32, and the same rounded M in a, b and c. Keeps its buffers; not thread-safe.
class PisoRowSearch {
 public:
  explicit PisoRowSearch(const ResolvedSpec& spec) : spec_(spec) {}

  // Begins a group: its weights, y (null: zeros), and the scale to start from.
  void Begin(int64_t count, const double* weights, const double* linear, QuantParams start);
  // First pass over the group's own rows of its slices, t = 0, 1, ...
  void Weigh(const float* slice, int64_t t);
  // After the last one: sorts the breakpoints that matter.
  void Sort();
  // Zero points to look at.
  int32_t first_zero() const;
  int32_t last_zero() const;
  // Second pass: chooses a zero point, streams the slices, and minimises. False: this zero point
  // cannot be better.
  bool Select(int32_t zero);
  void Stream(const float* slice, int64_t t);
  void Minimise();

  QuantParams best() const { return best_; }
  // f there.
  double error() const { return best_error_; }
  // Breakpoints crossed so far, for benchmarks and tests.
  int64_t crossings() const { return crossings_; }

  // Bytes that the buffers of a search over `count` weights grow to.
  static int64_t BytesFor(const ResolvedSpec& spec, int64_t count);

 private:
  // Where |code| of a weight rises to `code` as the scale falls.
  struct Breakpoint {
    double scale;
    int32_t feature;
    int16_t code;
    int16_t sign;
  };
  // Whether no scale up to `scale` can be better than the best known.
  bool Excluded(double scale, int32_t zero) const;
  // From where on the sweep stops, 0 if nowhere.
  double Stop(int32_t zero) const;
  void Offer(double scale, double a, double b);
  void MinimiseBetween(double from, double to, double a, double b);

  const ResolvedSpec& spec_;
  int64_t count_ = 0;
  const double* w_ = nullptr;
  std::vector<double> linear_;
  // M w and M k at the start.
  std::vector<double> image_;
  std::vector<double> start_image_;
  std::vector<double> start_codes_;
  std::vector<double> diagonal_;
  double square_ = 0;
  double constant_ = 0;
  std::vector<Breakpoint> sorted_;
  std::vector<Breakpoint> crossed_;
  // (M k)_i at each crossing.
  std::vector<double> met_;
  std::vector<double> stops_;
  double top_ = 0;
  int32_t zero_ = 0;
  QuantParams best_;
  double best_error_ = 0;
  int64_t crossings_ = 0;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SCALES_PISO_ROW_H_
