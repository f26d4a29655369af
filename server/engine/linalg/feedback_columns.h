// Feedback columns: U of (M1) in float32, packed as the sweep reads it.

#ifndef CERTIQ_ENGINE_LINALG_FEEDBACK_COLUMNS_H_
#define CERTIQ_ENGINE_LINALG_FEEDBACK_COLUMNS_H_

#include <cstdint>
#include <vector>

#include "engine/kernels/aligned.h"
#include "engine/linalg/udu_factor.h"
#include "engine/run_context.h"

namespace certiq::engine {

// Block b holds columns [b kPanelRows, ...), padded to kPanelRows with zeros, and rows [0, end(b)).
// The diagonal and what is below it is zero. How elements lie in a block depends on the
// instruction set: see feedback_kernel.h.
class FeedbackColumns {
 public:
  // `spare` is null or the same factor where nobody needs its U afterwards: its memory is given
  // back as it is read.
  FeedbackColumns(const Factor& factor, Factor* spare, Executor& executor);

  static int64_t BytesFor(int64_t features);
  int64_t features() const { return features_; }
  int64_t blocks() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t end(int64_t b) const;
  const float* block(int64_t b) const { return values_.data() + offsets_[static_cast<size_t>(b)]; }

 private:
  template <typename T>
  void Fill(const UpperTriangle<T>& u, UpperTriangle<T>* spare, Executor& executor);

  int64_t features_ = 0;
  std::vector<int64_t> offsets_;
  UnsetVector<float> values_;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_LINALG_FEEDBACK_COLUMNS_H_
