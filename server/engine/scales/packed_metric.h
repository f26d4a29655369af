// Packed metric: a full symmetric matrix in float32, in the order in which PiSO reads it (S3).

#ifndef CERTIQ_ENGINE_SCALES_PACKED_METRIC_H_
#define CERTIQ_ENGINE_SCALES_PACKED_METRIC_H_

#include <cstdint>
#include <vector>

#include "engine/kernels/aligned.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/run_context.h"

namespace certiq::engine {

// A symmetric matrix M = S + shift I [N, N] in float32, rows and columns sorted by group, and the
// columns of a group cut into slices of kWidth: slice t of group g holds columns [t kWidth, (t + 1)
// kWidth) of the group, padded with zeros, of every row, [N][kWidth], or of the group's own rows.
// What a search accumulates for a slice stays in registers while rows pass in any order; the rows
// of a group in a slice (512 KiB for 4096) stay in a second-level cache.
class PackedMetric {
 public:
  static constexpr int64_t kWidth = 32;
  enum class Rows { kAll, kOwn };

  // `group_of` has a group for each of the N features, 0 ... groups - 1. Only the upper triangle of
  // S is read. Rounds to float32: a relative 2^-24 of each entry, less than what the sums are off
  // by.
  PackedMetric(const UpperTriangle<double>& s, double shift, const std::vector<int32_t>& group_of,
               int64_t groups, Rows rows, Executor& executor);

  // Bytes for groups of this size (0: one group).
  static int64_t BytesFor(int64_t features, int64_t group_size, Rows rows);

  Rows rows() const { return rows_; }
  int64_t features() const { return static_cast<int64_t>(order_.size()); }
  int64_t groups() const { return static_cast<int64_t>(first_.size()) - 1; }
  // Features by group: element i is the feature of row i.
  const std::vector<int64_t>& order() const { return order_; }
  // Rows of group g: [first(g), first(g + 1)).
  int64_t first(int64_t g) const { return first_[static_cast<size_t>(g)]; }
  int64_t size(int64_t g) const { return first(g + 1) - first(g); }
  int64_t slices(int64_t g) const { return (size(g) + kWidth - 1) / kWidth; }
  // Slice t of group g from row 0 on; only where all rows are there.
  const float* slice(int64_t g, int64_t t) const {
    return values_.data() + (first_slice_[static_cast<size_t>(g)] + t) * features() * kWidth;
  }
  // The same from the group's first row on.
  const float* own(int64_t g, int64_t t) const {
    if (rows_ == Rows::kAll) return slice(g, t) + first(g) * kWidth;
    return values_.data() + own_[static_cast<size_t>(g)] + t * size(g) * kWidth;
  }

 private:
  Rows rows_;
  std::vector<int64_t> order_;
  std::vector<int64_t> first_;
  std::vector<int64_t> first_slice_;
  // Where a group's slices begin where there are only own rows.
  std::vector<int64_t> own_;
  UnsetVector<float> values_;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SCALES_PACKED_METRIC_H_
