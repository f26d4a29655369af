// Takes in one layer as it arrives: weights and activations, piece by piece.

#ifndef CERTIQ_JOB_LAYER_INTAKE_H_
#define CERTIQ_JOB_LAYER_INTAKE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "calibration/calibration.h"
#include "engine/gram/gram.h"
#include "engine/gram/held_out_split.h"
#include "engine/kernels/dtype.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/quantize_layer.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "observability/observer.h"
#include "runtime/byte_budget.h"

namespace certiq::server {

// Largest sizes taken. A product of any two of them, times 8 bytes, fits int64.
inline constexpr int64_t kMaxFeatures = 65536;
inline constexpr int64_t kMaxRows = 1048576;
inline constexpr int64_t kMaxTokens = int64_t{1} << 40;
inline constexpr int64_t kMaxWeights = int64_t{1} << 34;

// Messages of one stream in memory at once: one being folded, one waiting,
// and the copy that decoding makes.
inline constexpr int64_t kMessagesHeld = 3;
inline constexpr int64_t kMaxMessageBytes = int64_t{16} << 20;

// W [rows, features] of this type: INVALID_ARGUMENT beyond the limits above, and where it is not a
// floating one.
absl::Status CheckWeight(int64_t rows, int64_t features, engine::DType dtype);

// Rows in a piece of `bytes` bytes, which starts at `row_offset` and follows `rows_before` of
// `rows_in_all` rows: INVALID_ARGUMENT about "<chunk>.row_offset" or `data` where that is not so.
absl::StatusOr<int64_t> RowsIn(absl::string_view chunk, absl::string_view data, int64_t row_bytes,
                               int64_t row_offset, int64_t rows_before, int64_t rows_in_all,
                               int64_t bytes);

// A layer as its header announces it.
struct LayerRequest {
  engine::ResolvedSpec spec;
  // W [rows, features].
  int64_t rows = 0;
  int64_t features = 0;
  engine::DType weight_dtype = engine::DType::kF32;
  // X [tokens, x_features].
  int64_t tokens = 0;
  int64_t x_features = 0;
  engine::DType x_dtype = engine::DType::kF32;
  // X~ [x_quantized_tokens, x_quantized_features], where it is sent at all.
  std::optional<engine::DType> x_quantized_dtype = std::nullopt;
  int64_t x_quantized_tokens = 0;
  int64_t x_quantized_features = 0;
  // Share of the rows kept out of the fit, in [0, 0.5]; rows of a sequence, 0: unknown.
  double held_out_fraction = 0;
  int64_t sequence_rows = 0;
  // Its sums instead of activations: nothing about x is used then. Finalized.
  std::shared_ptr<Calibration> calibration = nullptr;

  bool mismatched() const {
    return calibration != nullptr ? calibration->mismatched() : x_quantized_dtype.has_value();
  }
};

// A layer taken in, and the bytes promised to it.
struct ReadyLayer {
  // Without sums where they come from a calibration.
  engine::LayerProblem problem;
  ByteBudget::Reservation reservation;
  std::optional<Calibration::Pin> calibration = std::nullopt;
};

// Errors are INVALID_ARGUMENT about a field of QuantizeRequest unless said
// otherwise; after one the intake is of no use. Not thread-safe. The executor, the
// cancellation and the observer outlive it.
class LayerIntake {
 public:
  // Checks every size and reserves what the layer will need at its peak; large memory
  // is taken with the first rows. RESOURCE_EXHAUSTED where the budget has no room.
  static absl::StatusOr<std::unique_ptr<LayerIntake>> Create(const LayerRequest& request,
                                                             ByteBudget& budget,
                                                             engine::Executor& executor,
                                                             const engine::Cancellation& cancelled,
                                                             Observer& observer = IgnoreEvents());

  // Bytes that Create reserves. REQUIRES: sizes within the limits above.
  static int64_t BytesFor(const LayerRequest& request);

  // Takes whole rows, which start at `row_offset`: the rows sent before.
  // RESOURCE_EXHAUSTED if memory runs out; the reason of the cancellation,
  // within a block of rows, where it asks to stop.
  absl::Status AppendWeights(int64_t row_offset, std::span<const std::byte> bytes);
  // Rows of X and, where the request is mismatched, the same rows of X~.
  absl::Status AppendActivations(int64_t row_offset, std::span<const std::byte> x,
                                 std::span<const std::byte> x_quantized = {});

  // Of all rows announced, the share that came.
  double fraction() const;
  const LayerRequest& request() const { return request_; }
  const engine::HeldOutSplit& split() const { return split_; }

  // The layer, if every row came; spends the intake.
  absl::StatusOr<ReadyLayer> Finish();

 private:
  LayerIntake(const LayerRequest& request, ByteBudget::Reservation reservation,
              engine::Executor& executor, const engine::Cancellation& cancelled, Observer& observer)
      : request_(request),
        split_(request.held_out_fraction,
               engine::HeldOutBlockRows(request.tokens, request.held_out_fraction,
                                        request.sequence_rows),
               ""),
        reservation_(std::move(reservation)),
        executor_(executor),
        cancelled_(cancelled),
        observer_(observer) {}

  absl::Status Allocate();
  // Rows that share a block: all of them fit or all held out.
  absl::Status FoldBlock(int64_t first_row, int64_t rows, const std::byte* x,
                         const std::byte* x_quantized);

  const LayerRequest request_;
  const engine::HeldOutSplit split_;
  // Declared before what it pays for, so that it is given back after.
  ByteBudget::Reservation reservation_;
  engine::Executor& executor_;
  const engine::Cancellation& cancelled_;
  Observer& observer_;

  int64_t weight_rows_ = 0;
  int64_t x_rows_ = 0;
  engine::StripMatrix weights_;
  std::optional<engine::StatisticsAccumulator> statistics_;
  // Only where rows are held out.
  std::optional<engine::StatisticsAccumulator> held_out_;
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_LAYER_INTAKE_H_
