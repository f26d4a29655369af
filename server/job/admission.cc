#include "job/admission.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"
#include "calibration/split_accumulator.h"
#include "contract/resolve_spec.h"
#include "engine/gram/held_out_split.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/quantize_layer.h"
#include "job/result.h"

namespace certiq::server {
namespace {

using base::InvalidField;
using base::PreconditionError;

constexpr int32_t kMaxPriority = 100;

// Messages of one upload in memory at once: one being folded, one waiting, and the copy that
// decoding makes.
constexpr int64_t kMessagesHeld = 3;

// A stored result's header, its certificate without rows, and lengths.
constexpr int64_t kSmallParts = int64_t{1} << 20;

// Blocks of a split that are counted one by one.
constexpr int64_t kMaxCountedBlocks = int64_t{1} << 20;

absl::Status CheckActivations(const JobRequest& request) {
  const Activations& x = *request.activations;
  RETURN_IF_ERROR(CheckSize("x.shape", "rows (tokens)", x.tokens, kMaxTokens));
  if (x.features != request.features) {
    return InvalidField(
        "x.shape",
        absl::StrCat("expected [tokens, ", request.features, "] as the weights have ",
                     request.features, " input features, got [", x.tokens, ", ", x.features, "]"));
  }
  if (x.x_quantized_dtype.has_value() &&
      (x.quantized_tokens != x.tokens || x.quantized_features != x.features)) {
    return InvalidField("x_quantized.shape",
                        absl::StrCat("expected [", x.tokens, ", ", x.features, "] as x, got [",
                                     x.quantized_tokens, ", ", x.quantized_features, "]"));
  }
  return absl::OkStatus();
}

// The rows of X that will be fitted to, or where counting would take long at least so many.
int64_t FitTokens(const Activations& x) {
  const engine::HeldOutSplit split(
      x.held_out_fraction, engine::HeldOutBlockRows(x.tokens, x.held_out_fraction, x.sequence_rows),
      "");
  const int64_t rows = split.block_rows();
  if (x.held_out_fraction <= 0 || x.tokens / rows >= kMaxCountedBlocks) return x.tokens;
  int64_t fit = 0;
  for (int64_t row = 0; row < x.tokens; row += rows) {
    if (!split.IsHeldOut(row)) fit += std::min(rows, x.tokens - row);
  }
  return fit;
}

// The tokens that the spec asks for.
absl::Status CheckTokens(const engine::ResolvedSpec& spec, int64_t tokens, bool held_out,
                         absl::string_view whose) {
  if (tokens < spec.min_tokens) {
    return PreconditionError(
        "TOKENS", "spec.min_tokens",
        absl::StrCat("the spec asks for ", spec.min_tokens, " tokens, ", whose, " has ", tokens));
  }
  if (spec.NeedsHeldOut() && !held_out) {
    return PreconditionError("HELD_OUT", "spec.damping.held_out",
                             absl::StrCat("no tokens of ", whose, " were held out"));
  }
  return absl::OkStatus();
}

bool Mismatched(const JobRequest& request, const CalibrationDesk::Pin& calibration) {
  return calibration ? calibration.record().mismatched()
                     : request.activations->x_quantized_dtype.has_value();
}

// Bytes of the largest message that brings rows of this layer.
int64_t LargestMessage(const JobRequest& request) {
  int64_t largest = request.rows * request.features * engine::ItemSize(request.weight_dtype);
  if (request.activations.has_value()) {
    const Activations& x = *request.activations;
    const int64_t item =
        engine::ItemSize(x.x_dtype) +
        (x.x_quantized_dtype.has_value() ? engine::ItemSize(*x.x_quantized_dtype) : 0);
    largest = std::max(largest, x.tokens * request.features * item);
  }
  // Field numbers, lengths and offsets come on top of the rows.
  constexpr int64_t kFraming = 64;
  return std::min(kMaxMessageBytes, largest + kFraming);
}

// The peak of a job that is not stored.
int64_t PeakBytes(const JobRequest& request, const CalibrationDesk::Pin& calibration) {
  int64_t upload = engine::StripMatrix::BytesFor(request.rows, request.features);
  if (request.activations.has_value()) {
    upload += SplitAccumulator::BytesFor(request.features, Mismatched(request, calibration),
                                         request.activations->held_out_fraction > 0);
  }
  // A frame of the result, as it is made and as the client has not read it yet.
  const int64_t frames =
      2 * std::min(kFrameBytes, 8 * request.rows * request.features + 64 * request.rows);
  // Staging of the sums is gone before the engine starts, so it is one or the other.
  return std::max(upload, EngineBytes(request, calibration)) +
         kMessagesHeld * LargestMessage(request) + frames;
}

// What a stored job's record takes, about.
int64_t RequestBytes(const JobRequest& request) {
  return RecordBytes(request.spec_message) +
         2 * static_cast<int64_t>(request.request_id.size() + request.layer_name.size());
}

}  // namespace

int64_t StoredBytes(int64_t rows, int64_t features, engine::DType weight_dtype,
                    const engine::ResolvedSpec& spec) {
  // Levels in float32 are the widest result; two doubles a row in the certificate, with tags.
  return rows * features * (engine::ItemSize(weight_dtype) + 4) + rows * spec.Groups(features) * 8 +
         features * 4 + rows * 24 + kSmallParts;
}

int64_t RunBytes(int64_t rows, int64_t features, const engine::ResolvedSpec& spec,
                 const CalibrationRecord& calibration) {
  return engine::PeakBytes(spec, rows, features, calibration.mismatched(),
                           calibration.held_out_fraction() > 0) +
         kWeightReadBytes;
}

int64_t EngineBytes(const JobRequest& request, const CalibrationDesk::Pin& calibration) {
  const bool held_out = calibration ? calibration.record().held_out_fraction() > 0
                                    : request.activations->held_out_fraction > 0;
  return engine::PeakBytes(request.spec, request.rows, request.features,
                           Mismatched(request, calibration), held_out);
}

absl::StatusOr<Admission> Admit(const Environment& environment, CalibrationDesk& calibrations,
                                const Tenant& tenant, const JobRequest& request) {
  if (!environment.pool.admitting()) return base::DrainingError();
  RETURN_IF_ERROR(CheckWeight(request.rows, request.features, request.weight_dtype));
  if (request.priority < -kMaxPriority || request.priority > kMaxPriority) {
    return InvalidField("priority", absl::StrCat("expected -", kMaxPriority, " to ", kMaxPriority,
                                                 ", got ", request.priority));
  }
  Admission admission;
  if (request.activations.has_value()) {
    RETURN_IF_ERROR(CheckActivations(request));
    RETURN_IF_ERROR(CheckSpecForLayer(request.spec, request.rows, request.features));
    const Activations& x = *request.activations;
    RETURN_IF_ERROR(CheckTokens(request.spec, FitTokens(x), x.held_out_fraction > 0, "x"));
  } else {
    ASSIGN_OR_RETURN(admission.calibration,
                     calibrations.PinFinalized(tenant, request.calibration_id));
    const CalibrationRecord& record = admission.calibration.record();
    if (record.features() != request.features) {
      return InvalidField(
          "weight.shape",
          absl::StrCat("expected ", record.features(), " input features as calibration ",
                       record.id(), " has, got ", request.features));
    }
    RETURN_IF_ERROR(CheckSpecForLayer(request.spec, request.rows, request.features));
    RETURN_IF_ERROR(CheckTokens(request.spec, record.tokens(), record.held_out_tokens() > 0,
                                absl::StrCat("calibration ", record.id())));
  }
  TenantQuota& quota = environment.quotas.Of(tenant);
  absl::StatusOr<CountQuota::Permit> permit = quota.jobs.Take("jobs");
  if (!permit.ok()) {
    environment.observer.Rejected(Rejection::kQuota);
    return permit.status();
  }
  admission.permit = *std::move(permit);
  absl::StatusOr<WorkerPool::Slot> slot = environment.pool.Admit(tenant.name);
  if (!slot.ok()) {
    if (absl::IsResourceExhausted(slot.status())) {
      environment.observer.Rejected(Rejection::kQueueFull);
    }
    return slot.status();
  }
  admission.slot = *std::move(slot);

  absl::Status room;
  if (!request.stored) {
    auto memory = quota.memory.TryReserve(PeakBytes(request, admission.calibration), "this layer");
    room = memory.status();
    if (memory.ok()) admission.memory = *std::move(memory);
  } else {
    room = quota.memory.CheckCanFit(
        RunBytes(request.rows, request.features, request.spec, admission.calibration.record()),
        "this job");
    if (room.ok()) {
      auto memory = quota.memory.TryReserve(kMessagesHeld * LargestMessage(request), "this upload");
      room = memory.status();
      if (memory.ok()) admission.memory = *std::move(memory);
    }
    if (room.ok()) {
      ByteBudget& store = environment.storage.catalog->durable() ? quota.disk : quota.memory;
      auto storage = store.TryReserve(
          StoredBytes(request.rows, request.features, request.weight_dtype, request.spec) +
              RequestBytes(request),
          "storing this job and its result");
      room = storage.status();
      if (storage.ok()) admission.storage = *std::move(storage);
    }
  }
  if (!room.ok()) {
    environment.observer.Rejected(Rejection::kOverBudget);
    return room;
  }
  return admission;
}

}  // namespace certiq::server
