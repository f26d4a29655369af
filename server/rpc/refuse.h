// Calls that end before they begin.

#ifndef CERTIQ_RPC_REFUSE_H_
#define CERTIQ_RPC_REFUSE_H_

#include <chrono>
#include <utility>

#include "absl/status/status.h"
#include "jobs/call_observer.h"
#include "rpc/call_registry.h"
#include "rpc/call_summary.h"
#include "rpc/quantize_reactor.h"
#include "rpc/status.h"

namespace certiq::rpc {

// `Reactor` is what gRPC wants of the method: grpc::ServerUnaryReactor, or a ServerReadReactor,
// ServerWriteReactor or ServerBidiReactor of messages or buffers. Finishes at once, without a
// read, and is counted and logged like any other call.
template <typename Reactor>
class RefusedCall final : public Reactor, public LiveCall {
 public:
  RefusedCall(const jobs::RpcMethod& method, const CallEnvironment& environment,
              absl::Status status)
      : method_(method), env_(environment) {
    summary_.method = method.method;
    summary_.status = std::move(status);
    env_.calls.CallStarted(method_);
    env_.registry.Add(this);
    this->Finish(ToGrpc(summary_.status));
  }

  // It has ended already.
  void Abort(const absl::Status& /*reason*/, bool /*only_waiting*/) override {}

  void OnDone() override {
    using Seconds = std::chrono::duration<double>;
    summary_.seconds = Seconds(std::chrono::steady_clock::now() - started_).count();
    env_.calls.CallHandled(method_, summary_.status.code(), summary_.seconds);
    if (env_.log) env_.log(summary_);
    env_.registry.Remove(this);
    delete this;
  }

 private:
  const jobs::RpcMethod method_;
  const CallEnvironment env_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  CallSummary summary_;
};

// What a service's method returns to refuse a call; owned by gRPC until OnDone.
// REQUIRES: !status.ok().
template <typename Reactor>
Reactor* Refuse(const CallEnvironment& environment, const jobs::RpcMethod& method,
                absl::Status status) {
  return new RefusedCall<Reactor>(method, environment, std::move(status));
}

}  // namespace certiq::rpc

#endif  // CERTIQ_RPC_REFUSE_H_
