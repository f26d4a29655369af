// The bookkeeping of a call: its metrics, its log line, its place in the registry.

#ifndef CERTIQ_RPC_CALLS_CALL_LIFE_H_
#define CERTIQ_RPC_CALLS_CALL_LIFE_H_

#include <grpcpp/server_context.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "calibration/calibration_desk.h"
#include "job/job_desk.h"
#include "observability/call_observer.h"
#include "rpc/calls/call_budget.h"
#include "rpc/calls/call_registry.h"
#include "rpc/calls/call_summary.h"
#include "rpc/transport/auth.h"

namespace certiq::server {

// What calls work with; all of it outlives them.
struct CallEnvironment {
  const Environment& environment;
  CalibrationDesk& calibrations;
  JobDesk& jobs;
  CallObserver& calls;
  CallRegistry& registry;
  CallBudget& budget;
  CallLog log;
  Authenticator* auth;
};

// Counts a call, keeps what its log line will say, and has it in the registry between Begin and
// Over. Not thread-safe, like the reactor that it is a member of.
class CallLife {
 public:
  CallLife(LiveCall* call, const RpcMethod& method, const CallEnvironment& environment,
           std::string tenant)
      : call_(call), method_(method), env_(environment) {
    summary.method = method.method;
    summary.tenant = std::move(tenant);
    env_.calls.CallStarted(method_);
  }

  // Once the call is whole: from now on it may be told to end.
  void Begin() { env_.registry.Add(call_); }
  void Received(int64_t bytes) {
    env_.calls.MessageReceived(method_);
    summary.received_bytes += bytes;
  }
  void Sent(int64_t bytes) {
    env_.calls.MessageSent(method_);
    summary.sent_bytes += bytes;
  }
  // The last thing before the reactor is deleted; the registry waits for its Deleted.
  void Over(absl::Status status) {
    summary.status = std::move(status);
    summary.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
    env_.calls.CallHandled(method_, summary.status.code(), summary.seconds);
    if (env_.log) env_.log(summary);
    env_.registry.Remove(call_);
  }
  // Why gRPC cancelled the call: its deadline, or the client.
  absl::Status CancelReason(const grpc::CallbackServerContext& context) const;

  CallSummary summary;

 private:
  LiveCall* const call_;
  const RpcMethod method_;
  const CallEnvironment& env_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  const std::chrono::system_clock::time_point wall_started_ = std::chrono::system_clock::now();
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_CALL_LIFE_H_
