#include "rpc/calls/call_life.h"

#include <algorithm>

namespace certiq::server {

absl::Status CallLife::CancelReason(const grpc::CallbackServerContext& context) const {
  // gRPC doesn't say which it was. The client's own timer cancels too, at the same moment or, since
  // timeouts are rounded up on the wire, a little before ours.
  using std::chrono::duration_cast;
  using std::chrono::milliseconds;
  const auto deadline = context.deadline();
  const auto now = std::chrono::system_clock::now();
  bool passed = false;
  if (deadline != std::chrono::system_clock::time_point::max()) {
    const auto slack =
        std::max(milliseconds(50), duration_cast<milliseconds>(deadline - wall_started_) / 100);
    passed = deadline - now <= slack;
  }
  return passed ? absl::DeadlineExceededError("the deadline passed before the work was done")
                : absl::CancelledError("the client cancelled the call");
}

}  // namespace certiq::server
