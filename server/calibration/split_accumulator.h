// The sums of a stream of tokens, split into rows to fit and rows that are held out (V1).

#ifndef CERTIQ_CALIBRATION_SPLIT_ACCUMULATOR_H_
#define CERTIQ_CALIBRATION_SPLIT_ACCUMULATOR_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/gram/gram.h"
#include "engine/gram/held_out_split.h"
#include "engine/run_context.h"

namespace certiq::server {

// Sums that never change again.
struct SplitSums {
  engine::SharedStatistics fit;
  // Null where nothing was held out.
  engine::SharedStatistics held_out;
};

// Folds rows as they arrive, whoever sends them: Accumulate calls into a calibration, or an upload
// that brings its own X. Not thread-safe.
class SplitAccumulator {
 public:
  // REQUIRES: features >= 1. `mismatched`: rows come in pairs of X and X~.
  SplitAccumulator(int64_t features, bool mismatched, bool holds_out);
  // Goes on from sums made before.
  SplitAccumulator(engine::Statistics fit, std::optional<engine::Statistics> held_out);

  // Bytes that it holds, its sums among them.
  static int64_t BytesFor(int64_t features, bool mismatched, bool holds_out);

  // Adds `rows` rows of X, and of X~ where `x_quantized` is not null, to the portions that `split`
  // says; the first is row `first_row` of its stream. Returns how many were held out. Errors are
  // engine::StatisticsAccumulator's, or the reason of `cancellation` (may be null), which is looked
  // at once a block; after one the sums are unusable.
  absl::StatusOr<int64_t> Append(const engine::TokenRows& x, const engine::TokenRows* x_quantized,
                                 int64_t first_row, int64_t rows, int64_t features,
                                 const engine::HeldOutSplit& split, engine::Executor& executor,
                                 const engine::Cancellation* cancellation);

  // Adds ready-made sums. REQUIRES: of the same kind; `held_out` only where rows are held out.
  void Add(bool held_out, const engine::Statistics& sums);

  // The sums of all rows of a portion so far, valid until the next call. REQUIRES: as Add's.
  const engine::Statistics& Flush(bool held_out, engine::Executor& executor);

  // The sums; the accumulator is spent.
  SplitSums Finish(engine::Executor& executor) &&;

  bool holds_out() const { return held_out_.has_value(); }

 private:
  engine::StatisticsAccumulator fit_;
  std::optional<engine::StatisticsAccumulator> held_out_;
};

}  // namespace certiq::server

#endif  // CERTIQ_CALIBRATION_SPLIT_ACCUMULATOR_H_
