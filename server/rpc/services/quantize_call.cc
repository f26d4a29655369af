#include "rpc/services/quantize_call.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "contract/enums.h"
#include "job/job_request.h"
#include "rpc/services/services.h"

namespace certiq::server {
namespace {

// Progress events held for a slow reader: a few rounds of phases, were a run to repeat them.
constexpr size_t kMaxProgress = 32;

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

int64_t RowsOf(const v1::TensorHeader& tensor) {
  return tensor.shape_size() == 0 ? 1 : tensor.shape(0);
}

int64_t RowBytesOf(const v1::TensorHeader& tensor) {
  const auto dtype = FromWire(tensor.dtype(), kDataTypes, "dtype");
  int64_t bytes = engine::ItemSize(dtype.value_or(engine::DType::kF32));
  for (int i = 1; i < tensor.shape_size(); ++i) bytes *= tensor.shape(i);
  return bytes;
}

}  // namespace

absl::Status QuantizeCall::Take(const Bytes& message) {
  ASSIGN_OR_RETURN(const v1::QuantizeRequest request,
                   Parse<v1::QuantizeRequest>(message, "a QuantizeRequest"));
  if (upload_ == nullptr) return TakeHeader(request);
  if (cancellation_.cancelled()) return cancellation_.status();
  switch (request.payload_case()) {
    case v1::QuantizeRequest::kHeader:
      return HeaderMisplaced();
    case v1::QuantizeRequest::kWeight:
      RETURN_IF_ERROR(
          upload_->AppendWeights(request.weight().row_offset(), AsBytes(request.weight().data())));
      break;
    case v1::QuantizeRequest::kActivation:
      RETURN_IF_ERROR(upload_->AppendActivations(request.activation().row_offset(),
                                                 AsBytes(request.activation().x()),
                                                 AsBytes(request.activation().x_quantized())));
      break;
    case v1::QuantizeRequest::PAYLOAD_NOT_SET:
      return base::InvalidField("payload", upload_->request().activations.has_value()
                                               ? "expected weight or activation, got none"
                                               : "expected weight, got none");
  }
  PushProgress(engine::Phase::kReceive, upload_->fraction());
  return absl::OkStatus();
}

absl::Status QuantizeCall::TakeHeader(const v1::QuantizeRequest& request) {
  if (!request.has_header()) return HeaderExpected(Name(request.payload_case()));
  ASSIGN_OR_RETURN(JobRequest job, ReadJobRequest(request.header()));
  life_.summary.request_id = job.request_id;
  life_.summary.layer_name = job.layer_name;
  life_.summary.rows = job.rows;
  life_.summary.features = job.features;
  life_.summary.tokens = job.activations.has_value() ? job.activations->tokens : 0;
  ASSIGN_OR_RETURN(upload_, env_.jobs.Begin(tenant_, std::move(job), cancellation_));
  PushProgress(engine::Phase::kReceive, 0);
  return absl::OkStatus();
}

absl::Status QuantizeCall::End() {
  if (upload_ == nullptr) return HeaderMissing();
  RETURN_IF_ERROR(upload_->Finish());
  PushProgress(engine::Phase::kQueue, 0);
  StartCallRun(env_.environment, env_.calibrations, *upload_,
               {.progress =
                    [this](engine::Phase phase, double fraction) {
                      PushProgress(phase, fraction);
                      Changed();
                    },
                .done =
                    [this](absl::StatusOr<CallResult> result) {
                      const absl::Status status = result.status();
                      if (result.ok()) {
                        const base::MutexLock lock(progress_mu_);
                        result_ = *std::move(result);
                      }
                      WorkEnded(status);
                    }},
               [this](const std::shared_ptr<Run>& run) {
                 WorkStarted([run](absl::StatusCode reason) { run->Cancel(reason); });
               });
  return absl::OkStatus();
}

void QuantizeCall::PushProgress(engine::Phase phase, double fraction) {
  const v1::Phase wire = ToWire(phase, kPhases);
  const base::MutexLock lock(progress_mu_);
  if (progress_.empty() || (progress_.back().phase() != wire && progress_.size() < kMaxProgress)) {
    progress_.emplace_back();
  }
  progress_.back().set_phase(wire);
  progress_.back().set_fraction(std::clamp(fraction, 0.0, 1.0));
}

absl::StatusOr<QuantizeCall::Produced> QuantizeCall::Produce(Bytes* outgoing) {
  {
    const base::MutexLock lock(progress_mu_);
    if (!progress_.empty()) {
      v1::QuantizeResponse frame;
      *frame.mutable_progress() = std::move(progress_.front());
      progress_.pop_front();
      RETURN_IF_ERROR(Serialize(frame, outgoing));
      return Produced::kMessage;
    }
    if (!result_.has_value()) return Produced::kNothingYet;
  }
  return ProduceResult(outgoing);
}

absl::StatusOr<QuantizeCall::Produced> QuantizeCall::ProduceResult(Bytes* outgoing) {
  ResultReader* reader = nullptr;
  {
    // It is set once, before anybody gets here.
    const base::MutexLock lock(progress_mu_);
    reader = result_->reader.get();
  }
  v1::QuantizeResponse frame;
  if (!header_sent_) {
    header_sent_ = true;
    *frame.mutable_result() = reader->record().header();
  } else if (reader->at_tensors()) {
    const google::protobuf::RepeatedPtrField<v1::TensorHeader>& tensors =
        reader->record().header().tensors();
    while (row_ >= RowsOf(tensors[tensor_]) || RowBytesOf(tensors[tensor_]) == 0) {
      row_ = 0;
      ++tensor_;
    }
    const int64_t row_bytes = RowBytesOf(tensors[tensor_]);
    const int64_t rows =
        std::min(RowsOf(tensors[tensor_]) - row_, std::max<int64_t>(1, kFrameBytes / row_bytes));
    v1::ResultChunk& chunk = *frame.mutable_chunk();
    chunk.set_tensor(tensor_);
    chunk.set_row_offset(row_);
    RETURN_IF_ERROR(reader->ReadBytes(rows * row_bytes, *chunk.mutable_data()));
    row_ += rows;
  } else if (!reader->at_end()) {
    RETURN_IF_ERROR(reader->ReadCertificate(*frame.mutable_certificate()));
  } else {
    return Produced::kEnd;
  }
  RETURN_IF_ERROR(Serialize(frame, outgoing));
  return Produced::kMessage;
}

void QuantizeCall::Drop() {
  upload_.reset();
  const base::MutexLock lock(progress_mu_);
  progress_.clear();
  result_.reset();
}

void AddQuantizationMethods(Router& router) {
  router.Add<QuantizeCall>(kQuantizeMethod, Scope::kWrite,
                           {.message_bytes = kMaxMessageBytes, .held_bytes = 0});
}

}  // namespace certiq::server
