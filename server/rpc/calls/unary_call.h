// Calls with one request and one answer.

#ifndef CERTIQ_RPC_CALLS_UNARY_CALL_H_
#define CERTIQ_RPC_CALLS_UNARY_CALL_H_

#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/status_macros.h"
#include "rpc/calls/call.h"

namespace certiq::server {

// Runs `work`, which fills the answer. What has begun is not cut off, since it is short; who
// cancelled does not hear of it.
template <typename Request, typename Response>
class UnaryCall final : public Call {
 public:
  using Work =
      std::function<absl::Status(const CallEnvironment&, const Tenant&, const Request&, Response&)>;

  UnaryCall(CallStart start, OnDrain on_drain, Work work)
      : Call(std::move(start), on_drain), work_(std::move(work)) {}

 protected:
  absl::Status Take(const Bytes& message) override {
    ASSIGN_OR_RETURN(const Request request,
                     Parse<Request>(message, Request::descriptor()->name().c_str()));
    Response response;
    RETURN_IF_ERROR(work_(env_, tenant_, request, response));
    return Respond(response);
  }

 private:
  const Work work_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_UNARY_CALL_H_
