#include "engine/scales/packed_metric.h"

#include <algorithm>

namespace certiq::engine {

PackedMetric::PackedMetric(const UpperTriangle<double>& s, double shift,
                           const std::vector<int32_t>& group_of, int64_t groups, Rows rows,
                           Executor& executor)
    : rows_(rows), order_(group_of.size()), first_(static_cast<size_t>(groups) + 1) {
  for (const int32_t g : group_of) ++first_[static_cast<size_t>(g) + 1];
  for (size_t g = 1; g < first_.size(); ++g) first_[g] += first_[g - 1];
  std::vector<int64_t> next = first_;
  for (size_t j = 0; j < group_of.size(); ++j) {
    order_[static_cast<size_t>(next[static_cast<size_t>(group_of[j])]++)] = static_cast<int64_t>(j);
  }
  first_slice_.assign(1, 0);
  for (int64_t g = 0; g < groups; ++g) first_slice_.push_back(first_slice_.back() + slices(g));
  const int64_t n = features();
  own_.assign(1, 0);
  for (int64_t g = 0; g < groups; ++g) own_.push_back(own_.back() + slices(g) * size(g) * kWidth);
  values_.resize(
      static_cast<size_t>(rows == Rows::kAll ? first_slice_.back() * n * kWidth : own_.back()));
  std::vector<int64_t> group_of_slice;
  for (int64_t g = 0; g < groups; ++g) {
    group_of_slice.insert(group_of_slice.end(), static_cast<size_t>(slices(g)), g);
  }
  executor.ParallelFor(first_slice_.back(), [&](int64_t at) {
    const int64_t g = group_of_slice[static_cast<size_t>(at)];
    const int64_t t = at - first_slice_[static_cast<size_t>(g)];
    const int64_t begin = first(g) + t * kWidth;
    const int64_t live = std::min(kWidth, first(g + 1) - begin);
    const int64_t from = rows == Rows::kAll ? 0 : first(g);
    const int64_t count = rows == Rows::kAll ? n : size(g);
    float* to =
        values_.data() +
        (rows == Rows::kAll ? at * n * kWidth : own_[static_cast<size_t>(g)] + t * count * kWidth);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = order_[static_cast<size_t>(from + i)];
      for (int64_t c = 0; c < kWidth; ++c) {
        if (c >= live) {
          to[i * kWidth + c] = 0;
          continue;
        }
        const int64_t column = order_[static_cast<size_t>(begin + c)];
        const double value = s.at(std::min(row, column), std::max(row, column));
        to[i * kWidth + c] = static_cast<float>(row == column ? value + shift : value);
      }
    }
  });
}

int64_t PackedMetric::BytesFor(int64_t features, int64_t group_size, Rows rows) {
  const int64_t group = group_size == 0 ? features : std::min(group_size, features);
  const int64_t groups = (features + group - 1) / group;
  return groups * ((group + kWidth - 1) / kWidth) * kWidth *
         (rows == Rows::kAll ? features : group) * 4;
}

}  // namespace certiq::engine
