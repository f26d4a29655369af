// Calls with one request and one answer.

#ifndef CERTIQ_RPC_CALLS_UNARY_REACTOR_H_
#define CERTIQ_RPC_CALLS_UNARY_REACTOR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "contract/rpc_status.h"
#include "rpc/calls/call_life.h"
#include "runtime/strand.h"

namespace certiq::server {

// Runs `work` as a task of a strand, or of the pool: it may touch the disk, and fills the response.
// What has begun is not cut off, since it is short; who cancelled does not hear of it.
template <typename Response>
class UnaryReactor final : public grpc::ServerUnaryReactor, public LiveCall {
 public:
  UnaryReactor(const CallEnvironment& environment, const RpcMethod& method, const Tenant& tenant,
               int64_t request_bytes, Response* response)
      : response_(response), life_(this, method, environment, tenant.name) {
    life_.Received(request_bytes);
  }

  // Once, after construction; may end the call before it returns.
  void Begin(WorkerPool& pool, Strand* strand, const std::function<absl::Status()>& work) {
    WorkerPool::Task task{.run = work,
                          .done = [this](absl::Status status) { End(std::move(status)); }};
    absl::Status posted =
        strand != nullptr ? strand->Post(std::move(task)) : pool.Post(std::move(task));
    if (!posted.ok()) End(std::move(posted));
  }

  // Before Begin.
  CallSummary& summary() { return life_.summary; }

  void Abort(const absl::Status& /*reason*/, bool /*only_waiting*/) override {}
  void OnDone() override {
    life_.Over(std::move(status_));
    delete this;
  }

 private:
  void End(absl::Status status) {
    status_ = std::move(status);
    if (status_.ok()) life_.Sent(static_cast<int64_t>(response_->ByteSizeLong()));
    const grpc::Status result = ToGrpc(status_);
    // After this the reactor may be gone.
    Finish(result);
  }

  Response* const response_;
  CallLife life_;
  absl::Status status_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_UNARY_REACTOR_H_
