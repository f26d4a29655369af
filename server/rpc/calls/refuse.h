// Calls that end before they begin.

#ifndef CERTIQ_RPC_CALLS_REFUSE_H_
#define CERTIQ_RPC_CALLS_REFUSE_H_

#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "contract/rpc_status.h"
#include "observability/call_observer.h"
#include "rpc/calls/call_life.h"
#include "rpc/calls/call_registry.h"

namespace certiq::server {

// `Reactor` is what gRPC wants of the method: grpc::ServerUnaryReactor, or a ServerReadReactor,
// ServerWriteReactor or ServerBidiReactor of messages or buffers. Finishes at once, without a
// read, and is counted and logged like any other call.
template <typename Reactor>
class RefusedCall final : public Reactor, public LiveCall {
 public:
  RefusedCall(const RpcMethod& method, const CallEnvironment& environment, absl::Status status)
      : life_(this, method, environment, ""), status_(std::move(status)) {
    // gRPC has read the one request of such a call before it asks us.
    const std::string_view type = method.type;
    if (type == "unary" || type == "server_stream") life_.Received(0);
    this->Finish(ToGrpc(status_));
  }

  // It has ended already.
  void Abort(const absl::Status& /*reason*/, bool /*only_waiting*/) override {}

  void OnDone() override {
    life_.Over(std::move(status_));
    delete this;
  }

 private:
  CallLife life_;
  absl::Status status_;
};

// What a service's method returns to refuse a call; owned by gRPC until OnDone.
// REQUIRES: !status.ok().
template <typename Reactor>
Reactor* Refuse(const CallEnvironment& environment, const RpcMethod& method, absl::Status status) {
  return new RefusedCall<Reactor>(method, environment, std::move(status));
}

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_REFUSE_H_
