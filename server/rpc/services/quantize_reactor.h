// QuantizationService.Quantize: one call, one reactor.

#ifndef CERTIQ_RPC_SERVICES_QUANTIZE_REACTOR_H_
#define CERTIQ_RPC_SERVICES_QUANTIZE_REACTOR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/sha256.h"
#include "certiq/v1/quantization_service.pb.h"
#include "contract/convert.h"
#include "engine/run_context.h"
#include "job/layer_intake.h"
#include "job/quantize_job.h"
#include "observability/call_observer.h"
#include "observability/observer.h"
#include "rpc/calls/call_life.h"
#include "rpc/calls/call_registry.h"
#include "rpc/calls/result_stream.h"
#include "runtime/byte_budget.h"
#include "runtime/tenant.h"
#include "runtime/throttle.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// The life of a call:
//  1. kHeader: one read is outstanding and nothing is reserved. The header is parsed and
//     checked where it arrives, on gRPC's thread: it is small work, and a refusal should not
//     wait for a worker. Admission takes a place in the queue and bytes from the budget.
//  2. kReceiving: messages go to the pool as tasks, one after the other, which
//     parse, hash, decode and fold them. Two messages are held at most; beyond that nothing is
//     read, and flow control stops the client.
//  3. When the client has half-closed and the last message is folded, the intake is finished, as a
//     task too, and becomes a job.
//  4. kWorking: the job waits and runs; progress is written as it comes. What
//     a slow reader has no room for is coalesced: the latest of each phase.
//  5. kSending: result header, chunks, certificate, each written when the one before is out.
//  6. Finish, in Advance and nowhere else: when the result is out, or once status_ holds a failure,
//     as soon as no task, no job and no write is under way. So nothing
//     of ours runs when gRPC calls OnDone, and what was held is given back before the client hears.
//  7. OnDone, after every other reaction: tells the watchers and deletes the reactor.
// OnCancel (the client left, or the deadline passed), a broken message, a failed
// job and Abort all do the same: set status_ if it is still OK, stop the work, Advance.
//
// Frames are raw byte buffers, so that parsing happens on the pool and bytes that
// do not parse are told from a stream that ended.
//
// One mutex guards everything; StartRead, StartWrite and Finish are called with it held (gRPC never
// runs a reaction inside them), completions of the pool come without it.
class QuantizeReactor final : public grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                              public LiveCall {
 public:
  // The caller is known already and may quantize.
  QuantizeReactor(grpc::CallbackServerContext* context, const CallEnvironment& environment,
                  const Tenant& tenant);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;
  void Abort(const absl::Status& reason, bool only_waiting) override;

 private:
  using Clock = std::chrono::steady_clock;
  enum class Stage { kHeader, kReceiving, kWorking, kSending };

  // All of these need mu_.
  void Advance();
  void ReadMore();
  void WriteMore();
  void HandleHeader(const grpc::ByteBuffer& message);
  absl::Status ReadHeader(const grpc::ByteBuffer& message);
  absl::Status Admit(QuantizeCall& call);
  void PostNextMessage();
  void PostFinish();
  void PushProgress(engine::Phase phase, double fraction);
  // Keeps the first failure and tells whatever runs to stop.
  void SetFailure(absl::Status status);
  // SetFailure, counted as a request that was not taken on.
  void Refuse(absl::Status status);
  bool Busy() const { return task_running_ || job_ != nullptr; }

  // On the pool, one at a time, without mu_; they own intake_ and the digests meanwhile.
  absl::Status Fold(grpc::ByteBuffer& message);
  absl::Status FoldWeights(const v1::TensorChunk& chunk);
  absl::Status FoldActivations(const v1::ActivationChunk& chunk);
  absl::Status FinishIntake();

  // Completions, without mu_.
  void OnFolded(absl::Status status);
  void OnIntakeFinished(absl::Status status);
  void OnProgress(engine::Phase phase, double fraction);
  void OnJobDone(absl::StatusOr<QuantizeResult> result);

  grpc::CallbackServerContext* const context_;
  const CallEnvironment& env_;
  const Tenant tenant_;
  CallLife life_;

  std::mutex mu_;
  Stage stage_ = Stage::kHeader;
  bool reading_ = false;       // a StartRead is outstanding
  bool writing_ = false;       // a StartWrite is outstanding
  bool half_closed_ = false;   // the client has no more to say
  bool task_running_ = false;  // a task is on the pool
  bool finished_ = false;      // Finish was called
  absl::Status status_;        // the first failure

  grpc::ByteBuffer incoming_;
  grpc::ByteBuffer outgoing_;
  std::deque<grpc::ByteBuffer> waiting_;
  std::deque<v1::Progress> progress_;
  ProgressGate progress_gate_;

  // Read by the intake without mu_; an atomic.
  engine::Cancellation cancellation_;
  WorkerPool::Slot slot_;
  CountQuota::Place place_;
  Clock::time_point header_at_;
  std::unique_ptr<LayerIntake> intake_;
  base::Sha256 weights_digest_;
  base::Sha256 x_digest_;
  base::Sha256 x_quantized_digest_;
  CallFacts facts_;
  // Between FinishIntake and the job.
  std::optional<ReadyLayer> ready_;
  std::shared_ptr<QuantizeJob> job_;
  std::unique_ptr<ResultStream> result_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_QUANTIZE_REACTOR_H_
