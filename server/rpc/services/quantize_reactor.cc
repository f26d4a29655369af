#include "rpc/services/quantize_reactor.h"

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <new>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "contract/rpc_status.h"
#include "rpc/calls/message_reactor.h"

namespace certiq::server {
namespace {

// Messages held beside the one that gRPC reads.
constexpr size_t kMessages = 2;
// Progress events held for a slow reader: a few rounds of phases, were a job to repeat them.
constexpr size_t kMaxProgress = 32;

std::span<const std::byte> AsBytes(const std::string& data) {
  return std::as_bytes(std::span(data.data(), data.size()));
}

const char* Name(v1::QuantizeRequest::PayloadCase payload) {
  switch (payload) {
    case v1::QuantizeRequest::kHeader:
      return "header";
    case v1::QuantizeRequest::kWeight:
      return "weight";
    case v1::QuantizeRequest::kActivation:
      return "activation";
    case v1::QuantizeRequest::PAYLOAD_NOT_SET:
      break;
  }
  return "none";
}

// Runs `body` where an exception would end the process: on gRPC's threads, and in completions.
absl::Status Guarded(const std::function<absl::Status()>& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    absl::Status status = absl::ResourceExhaustedError("the server ran out of memory");
    base::SetRetryAfter(status, base::kRetrySoon);
    return status;
  }
}

}  // namespace

QuantizeReactor::QuantizeReactor(grpc::CallbackServerContext* context,
                                 const CallEnvironment& environment, const Tenant& tenant)
    : context_(context),
      env_(environment),
      tenant_(tenant),
      life_(this, kQuantizeMethod, environment, tenant.name) {
  // First in the registry, then a look at the pool: a drain that begins between
  // the two finds this call in the registry.
  const std::lock_guard lock(mu_);
  if (!env_.jobs.pool.admitting()) {
    env_.jobs.observer.Rejected(Rejection::kDraining);
    SetFailure(env_.jobs.pool.Admit().status());
  }
  Advance();
}

void QuantizeReactor::OnReadDone(bool ok) {
  // A call that ends early ends its reads too, before or after OnCancel; that is no half-close.
  if (!ok && context_->IsCancelled()) OnCancel();
  const std::lock_guard lock(mu_);
  reading_ = false;
  if (!ok) {
    half_closed_ = true;
  } else {
    life_.Received(static_cast<int64_t>(incoming_.Length()));
    grpc::ByteBuffer message;
    message.Swap(&incoming_);
    if (status_.ok()) {
      if (stage_ == Stage::kHeader) {
        HandleHeader(message);
      } else {
        waiting_.push_back(std::move(message));
      }
    }
  }
  Advance();
}

void QuantizeReactor::OnWriteDone(bool ok) {
  // Writes fail only where the call is over; without this the rest would be thrown after it.
  if (!ok) OnCancel();
  const std::lock_guard lock(mu_);
  writing_ = false;
  if (ok) life_.Sent(static_cast<int64_t>(outgoing_.Length()));
  outgoing_.Clear();
  Advance();
}

void QuantizeReactor::OnCancel() { Abort(life_.CancelReason(*context_), /*only_waiting=*/false); }

void QuantizeReactor::Abort(const absl::Status& reason, bool only_waiting) {
  std::shared_ptr<QuantizeJob> job;
  {
    const std::lock_guard lock(mu_);
    if (finished_ || (only_waiting && stage_ != Stage::kHeader)) return;
    SetFailure(reason);
    job = job_;
    Advance();
  }
  // Without the lock: a queued job completes inside.
  if (job != nullptr) job->Cancel(reason.code());
}

void QuantizeReactor::OnDone() {
  absl::Status status;
  {
    // Whoever called Finish may still be about to unlock.
    const std::lock_guard lock(mu_);
    status = status_;
  }
  life_.Over(std::move(status));
  // gRPC holds the only other pointer and lets go of it with this reaction.
  delete this;
}

void QuantizeReactor::Advance() {
  if (finished_) return;
  if (status_.ok() && stage_ == Stage::kHeader && half_closed_) {
    SetFailure(base::InvalidField("header",
                                  "expected as the first message, the stream ended without one"));
  }
  if (status_.ok()) {
    if (stage_ == Stage::kReceiving && !task_running_) {
      if (!waiting_.empty()) {
        PostNextMessage();
      } else if (half_closed_) {
        PostFinish();
      }
    }
    if (status_.ok()) ReadMore();
    if (status_.ok()) WriteMore();
    if (status_.ok() || finished_) return;
  }
  // Failed. Let go of everything that no work of ours uses.
  waiting_.clear();
  progress_.clear();
  if (Busy()) return;
  intake_.reset();
  ready_.reset();
  slot_.Release();
  place_ = CountQuota::Place();
  if (writing_) return;
  result_.reset();
  finished_ = true;
  Finish(ToGrpc(status_));
}

void QuantizeReactor::ReadMore() {
  const bool expects = stage_ == Stage::kHeader || stage_ == Stage::kReceiving;
  const size_t held = waiting_.size() + (task_running_ ? 1 : 0);
  if (!expects || reading_ || half_closed_ || held >= kMessages) return;
  reading_ = true;
  StartRead(&incoming_);
}

void QuantizeReactor::WriteMore() {
  if (writing_) return;
  bool last = false;
  absl::Status made = Guarded([&] {
    v1::QuantizeResponse frame;
    if (!progress_.empty()) {
      *frame.mutable_progress() = std::move(progress_.front());
      progress_.pop_front();
    } else if (stage_ == Stage::kSending) {
      last = !result_->Next(frame);
    }
    if (frame.payload_case() == v1::QuantizeResponse::PAYLOAD_NOT_SET) return absl::OkStatus();
    bool own = false;  // the buffer; always so
    writing_ =
        grpc::SerializationTraits<v1::QuantizeResponse>::Serialize(frame, &outgoing_, &own).ok();
    return writing_ ? absl::OkStatus() : absl::InternalError("a response could not be serialized");
  });
  if (!made.ok()) {
    SetFailure(std::move(made));
  } else if (writing_) {
    StartWrite(&outgoing_);
  } else if (last) {
    result_.reset();
    finished_ = true;
    Finish(grpc::Status::OK);
  }
}

void QuantizeReactor::SetFailure(absl::Status status) {
  if (!status_.ok()) return;
  status_ = std::move(status);
  cancellation_.Cancel(status_.code());
}

void QuantizeReactor::Refuse(absl::Status status) {
  CountRejection(status, env_.jobs.observer);
  SetFailure(std::move(status));
}

void QuantizeReactor::HandleHeader(const grpc::ByteBuffer& message) {
  header_at_ = Clock::now();
  absl::Status status = Guarded([&] { return ReadHeader(message); });
  if (!status.ok()) {
    Refuse(std::move(status));
    return;
  }
  stage_ = Stage::kReceiving;
  PushProgress(engine::Phase::kReceive, 0);
}

absl::Status QuantizeReactor::ReadHeader(const grpc::ByteBuffer& message) {
  const auto request = Parse<v1::QuantizeRequest>(message, "a QuantizeRequest");
  if (!request.ok()) return request.status();
  if (!request->has_header()) {
    return base::InvalidField("header", absl::StrCat("expected as the first message, got ",
                                                     Name(request->payload_case())));
  }
  absl::StatusOr<QuantizeCall> call = FromProto(request->header());
  if (!call.ok()) return call.status();
  life_.summary.request_id = call->request_id;
  life_.summary.layer_name = call->layer_name;
  life_.summary.rows = call->layer.rows;
  life_.summary.features = call->layer.features;
  life_.summary.tokens = call->layer.tokens;
  return Admit(*call);
}

absl::Status QuantizeReactor::Admit(QuantizeCall& call) {
  if (!call.calibration_id.empty()) {
    const auto calibration = env_.calibrations.Find(tenant_, call.calibration_id);
    if (!calibration.ok()) return calibration.status();
    const CalibrationRecord about = (*calibration)->View(false).record;
    if (about.finalize_time == 0) {
      return base::PreconditionError("NOT_FINALIZED", about.id, "the calibration is not finalized");
    }
    if (about.features != call.layer.features) {
      return base::InvalidField(
          "weight.shape",
          absl::StrCat("expected ", about.features, " input features as calibration ", about.id,
                       " has, got ", call.layer.features));
    }
    call.layer.calibration = *calibration;
    call.layer.held_out_fraction = about.held_out_fraction;
  }
  Account& account = env_.jobs.accounts.Of(tenant_);
  absl::StatusOr<CountQuota::Place> place = account.jobs.Take("jobs");
  if (!place.ok()) {
    env_.jobs.observer.Rejected(Rejection::kQuota);
    return place.status();
  }
  place_ = *std::move(place);
  absl::StatusOr<WorkerPool::Slot> slot = env_.jobs.pool.Admit();
  if (!slot.ok()) {
    if (absl::IsResourceExhausted(slot.status())) {
      env_.jobs.observer.Rejected(Rejection::kQueueFull);
    }
    return slot.status();
  }
  absl::StatusOr<std::unique_ptr<LayerIntake>> intake = LayerIntake::Create(
      call.layer, account.memory, env_.jobs.pool, cancellation_, env_.jobs.observer);
  if (!intake.ok()) {
    if (absl::IsResourceExhausted(intake.status())) {
      env_.jobs.observer.Rejected(Rejection::kOverBudget);
    }
    return intake.status();
  }
  slot_ = *std::move(slot);
  intake_ = *std::move(intake);
  return absl::OkStatus();
}

void QuantizeReactor::PostNextMessage() {
  // A task must be copyable; the buffer's slices are freed as soon as they are parsed.
  const auto message = std::make_shared<grpc::ByteBuffer>(std::move(waiting_.front()));
  waiting_.pop_front();
  task_running_ = true;
  absl::Status posted =
      env_.jobs.pool.Post({.run = [this, message] { return Fold(*message); },
                           .done = [this](absl::Status status) { OnFolded(std::move(status)); }});
  if (posted.ok()) return;
  task_running_ = false;
  SetFailure(std::move(posted));
}

void QuantizeReactor::PostFinish() {
  task_running_ = true;
  absl::Status posted = env_.jobs.pool.Post(
      {.run = [this] { return FinishIntake(); },
       .done = [this](absl::Status status) { OnIntakeFinished(std::move(status)); }});
  if (posted.ok()) return;
  task_running_ = false;
  SetFailure(std::move(posted));
}

absl::Status QuantizeReactor::Fold(grpc::ByteBuffer& message) {
  if (cancellation_.cancelled()) return cancellation_.status();
  const auto parsed = Parse<v1::QuantizeRequest>(message, "a QuantizeRequest");
  if (!parsed.ok()) return parsed.status();
  const v1::QuantizeRequest& request = *parsed;
  message.Clear();
  switch (request.payload_case()) {
    case v1::QuantizeRequest::kHeader:
      return base::InvalidField("payload", "expected one header, got a second");
    case v1::QuantizeRequest::kWeight:
      return FoldWeights(request.weight());
    case v1::QuantizeRequest::kActivation:
      return FoldActivations(request.activation());
    case v1::QuantizeRequest::PAYLOAD_NOT_SET:
      break;
  }
  return base::InvalidField("payload", "expected weight or activation, got none");
}

absl::Status QuantizeReactor::FoldWeights(const v1::TensorChunk& chunk) {
  absl::Status status = intake_->AppendWeights(chunk.row_offset(), AsBytes(chunk.data()));
  if (status.ok()) weights_digest_.Update(chunk.data());
  return status;
}

absl::Status QuantizeReactor::FoldActivations(const v1::ActivationChunk& chunk) {
  absl::Status status = intake_->AppendActivations(chunk.row_offset(), AsBytes(chunk.x()),
                                                   AsBytes(chunk.x_quantized()));
  if (status.ok()) {
    x_digest_.Update(chunk.x());
    x_quantized_digest_.Update(chunk.x_quantized());
  }
  return status;
}

absl::Status QuantizeReactor::FinishIntake() {
  absl::StatusOr<ReadyLayer> ready = intake_->Finish();
  if (!ready.ok()) return ready.status();
  ready_ = *std::move(ready);
  facts_.weights_sha256 = weights_digest_.Finish();
  facts_.x_sha256 = x_digest_.Finish();
  if (intake_->request().x_quantized_dtype.has_value())
    facts_.x_quantized_sha256 = x_quantized_digest_.Finish();
  if (ready_->calibration.has_value()) {
    const CalibrationRecord about = (*ready_->calibration)->View(false).record;
    facts_.x_sha256.clear();
    facts_.calibration_id = about.id;
    facts_.sums_sha256 = about.sums_sha256;
    facts_.held_out_fraction = about.held_out_fraction;
    facts_.held_out_block_rows = about.held_out_block_rows;
    return absl::OkStatus();
  }
  facts_.held_out_fraction = intake_->split().fraction();
  facts_.held_out_block_rows = intake_->split().block_rows();
  return absl::OkStatus();
}

void QuantizeReactor::OnFolded(absl::Status status) {
  const std::lock_guard lock(mu_);
  task_running_ = false;
  if (status.ok()) {
    PushProgress(engine::Phase::kReceive, intake_->fraction());
  } else if (status_.ok()) {
    Refuse(std::move(status));
  }
  Advance();
}

void QuantizeReactor::OnIntakeFinished(absl::Status status) {
  std::shared_ptr<QuantizeJob> job;
  WorkerPool::Slot slot;
  {
    const std::lock_guard lock(mu_);
    task_running_ = false;
    facts_.receive_seconds = std::chrono::duration<double>(Clock::now() - header_at_).count();
    if (!status.ok() && status_.ok()) {
      Refuse(std::move(status));
    }
    if (status_.ok()) {
      intake_.reset();
      job_ = std::make_shared<QuantizeJob>(
          env_.jobs.pool, env_.jobs.observer, *std::exchange(ready_, std::nullopt),
          QuantizeJob::Options{
              .progress = [this](engine::Phase phase,
                                 double fraction) { OnProgress(phase, fraction); },
              .done =
                  [this](absl::StatusOr<QuantizeResult> result) { OnJobDone(std::move(result)); }});
      job = job_;
      slot = std::move(slot_);
      stage_ = Stage::kWorking;
      PushProgress(engine::Phase::kQueue, 0);
    }
    Advance();
  }
  // Without the lock: the job may complete inside. While job_ is set the call does not finish;
  // after Start this reactor may be gone.
  if (job != nullptr) job->Start(std::move(slot));
}

void QuantizeReactor::PushProgress(engine::Phase phase, double fraction) {
  const v1::Phase wire = ToProto(phase);
  if (progress_.empty() || (progress_.back().phase() != wire && progress_.size() < kMaxProgress)) {
    progress_.emplace_back();
  }
  progress_.back().set_phase(wire);
  progress_.back().set_fraction(std::clamp(fraction, 0.0, 1.0));
}

void QuantizeReactor::OnProgress(engine::Phase phase, double fraction) {
  if (!progress_gate_.Passes(phase)) return;
  const std::lock_guard lock(mu_);
  if (!status_.ok()) return;
  PushProgress(phase, fraction);
  Advance();
}

void QuantizeReactor::OnJobDone(absl::StatusOr<QuantizeResult> result) {
  std::unique_ptr<ResultStream> frames;
  absl::Status status = Guarded([&] {
    if (!result.ok()) return result.status();
    frames = std::make_unique<ResultStream>(*std::move(result), facts_);
    return absl::OkStatus();
  });
  const std::lock_guard lock(mu_);
  // The pool lets go of the job after this; nothing of it runs any more.
  job_.reset();
  if (status.ok()) {
    result_ = std::move(frames);
    stage_ = Stage::kSending;
  } else {
    SetFailure(std::move(status));
  }
  Advance();
}

}  // namespace certiq::server
