#include "engine/linalg/feedback_columns.h"

#include <algorithm>

#include "engine/linalg/feedback_kernel.h"

namespace certiq::engine {

FeedbackColumns::FeedbackColumns(const Factor& factor, Factor* spare, Executor& executor) {
  if (factor.narrow.size() > 0) {
    Fill(factor.narrow, spare != nullptr ? &spare->narrow : nullptr, executor);
  } else {
    Fill(factor.u, spare != nullptr ? &spare->u : nullptr, executor);
  }
}

template <typename T>
void FeedbackColumns::Fill(const UpperTriangle<T>& u, UpperTriangle<T>* spare, Executor& executor) {
  features_ = u.size();
  offsets_.reserve(static_cast<size_t>(u.panels()) + 1);
  int64_t offset = 0;
  for (int64_t b = 0; b < u.panels(); ++b) {
    offsets_.push_back(offset);
    offset += u.end(b) * kPanelRows;
  }
  offsets_.push_back(offset);
  values_.resize(static_cast<size_t>(offset));
  for (int64_t p = 0; p < u.panels(); ++p) {
    executor.ParallelFor(u.panels() - p, [&](int64_t later) {
      const int64_t b = p + later;
      float* to = values_.data() + offsets_[static_cast<size_t>(b)];
      for (int64_t k = u.begin(p); k < u.end(p); ++k) {
        const int64_t first = std::max(k + 1, u.begin(b));
        for (int64_t g = 0; g < kGroups; ++g) {
          float* group = to + FeedbackOffset(u.end(b), g, k);
          const int64_t j0 = u.begin(b) + g * kMicroRows;
          if (j0 >= first && j0 + kMicroRows <= u.end(b)) {
            const T* from = &u.at(k, j0);
            for (int64_t lane = 0; lane < kMicroRows; ++lane) {
              group[lane] = static_cast<float>(from[lane]);
            }
            continue;
          }
          for (int64_t lane = 0; lane < kMicroRows; ++lane) {
            const int64_t j = j0 + lane;
            group[lane] = j >= first && j < u.end(b) ? static_cast<float>(u.at(k, j)) : 0.0f;
          }
        }
      }
    });
    if (spare != nullptr) spare->DiscardBefore(p + 1);
  }
  if (spare != nullptr) *spare = UpperTriangle<T>();
}

int64_t FeedbackColumns::end(int64_t b) const { return std::min(features_, (b + 1) * kPanelRows); }

int64_t FeedbackColumns::BytesFor(int64_t features) {
  int64_t rows = 0;
  for (int64_t begin = 0; begin < features; begin += kPanelRows) {
    rows += std::min(begin + kPanelRows, features);
  }
  return rows * kPanelRows * 4;
}

}  // namespace certiq::engine
