// Refinement's H in float32, packed as its products read it.
// Included by .cc files of the engine only, like simd.h.

#ifndef CERTIQ_ENGINE_METHODS_REFINE_FORM_H_
#define CERTIQ_ENGINE_METHODS_REFINE_FORM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "engine/kernels/aligned.h"
#include "engine/kernels/simd.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/run_context.h"

namespace certiq::engine {

// H = S + lambda I, features in the order given, divided by a power of two so that its entries are
// at most about 1. Blocks of kPanelRows rows, the last one padded with zeros; a block in groups of
// kMicroRows rows, each [features][kMicroRows]: any run of columns is contiguous. N^2 floats.
class RefineForm {
 public:
  static constexpr int64_t kSlice = 128;
  static constexpr int64_t kGroups = kPanelRows / kMicroRows;
  static_assert(kPanelRows % kMicroRows == 0);

  // `order`: element i is the feature of S that comes at place i.
  RefineForm(const UpperTriangle<double>& s, double lambda, std::vector<int64_t> order,
             Executor& executor)
      : order_(std::move(order)),
        values_(static_cast<size_t>(BytesFor(s.size()) / static_cast<int64_t>(sizeof(float)))),
        diagonal_(order_.size()) {
    double largest = 0;
    for (int64_t j = 0; j < s.size(); ++j) largest = std::max(largest, s.at(j, j) + lambda);
    unit_ = largest > 0 && std::isfinite(largest) ? std::ldexp(1.0, -std::ilogb(largest) - 1) : 1;
    executor.ParallelFor(blocks() * kGroups, [&](int64_t group) {
      float* to = values_.data() + group * features() * kMicroRows;
      for (int64_t k = 0; k < features(); ++k) {
        for (int64_t r = 0; r < kMicroRows; ++r) {
          const int64_t i = group * kMicroRows + r;
          to[k * kMicroRows + r] = i < features() ? Entry(s, lambda, i, k) : 0;
        }
      }
    });
    for (int64_t i = 0; i < features(); ++i) {
      diagonal_[static_cast<size_t>(i)] = Entry(s, lambda, i, i);
    }
  }

  static int64_t BytesFor(int64_t features) {
    return (features + kPanelRows - 1) / kPanelRows * kPanelRows * features *
           static_cast<int64_t>(sizeof(float));
  }

  int64_t features() const { return static_cast<int64_t>(order_.size()); }
  int64_t blocks() const { return (features() + kPanelRows - 1) / kPanelRows; }
  int64_t begin(int64_t b) const { return b * kPanelRows; }
  int64_t end(int64_t b) const { return std::min(features(), (b + 1) * kPanelRows); }
  const std::vector<int64_t>& order() const { return order_; }
  // What H was multiplied with.
  double unit() const { return unit_; }
  float diagonal(int64_t i) const { return diagonal_[static_cast<size_t>(i)]; }

  // H_ij for the rows i of micro-group g of block b.
  const float* Column(int64_t b, int64_t g, int64_t j) const {
    return values_.data() + ((b * kGroups + g) * features() + j) * kMicroRows;
  }

  // out [kPanelRows][kStrip] += sum_{k0 <= k < k1} H_ik x_k for the rows i of block b; x is
  // [features][kStrip]. At most kSlice columns, so that they stay in cache while strips pass.
  void AddSlice(int64_t b, int64_t k0, int64_t k1, const float* x, float* out) const {
    for (int64_t g = 0; g < kGroups; ++g) {
      MultiplyIntoStrip(kMicroRows, k1 - k0, Column(b, g, k0), int64_t{kMicroRows}, int64_t{1},
                        x + k0 * kStrip<float>, out + g * kMicroRows * kStrip<float>);
    }
  }

  // r_i += H_ij d for the rows i of block b; d is [kStrip].
  void AddColumn(int64_t b, int64_t j, const float* d, float* r) const {
    const Vector<float> low = LoadVector(d);
    const Vector<float> high = LoadVector(d + kLanes<float>);
    for (int64_t g = 0; g < kGroups; ++g) {
      const float* column = Column(b, g, j);
      for (int64_t i = 0; i < kMicroRows; ++i) {
        float* to = r + (g * kMicroRows + i) * kStrip<float>;
        StoreVector(to, LoadVector(to) + column[i] * low);
        StoreVector(to + kLanes<float>, LoadVector(to + kLanes<float>) + column[i] * high);
      }
    }
  }

 private:
  float Entry(const UpperTriangle<double>& s, double lambda, int64_t i, int64_t k) const {
    const int64_t a = order_[static_cast<size_t>(i)];
    const int64_t b = order_[static_cast<size_t>(k)];
    const double entry = s.at(std::min(a, b), std::max(a, b)) + (a == b ? lambda : 0);
    return static_cast<float>(entry * unit_);
  }

  std::vector<int64_t> order_;
  double unit_ = 1;
  UnsetVector<float> values_;
  std::vector<float> diagonal_;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_METHODS_REFINE_FORM_H_
