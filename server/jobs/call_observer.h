// What rpc/ tells whoever watches calls; plain C++, so that metrics/ needs no
// gRPC to count them.

#ifndef CERTIQ_JOBS_CALL_OBSERVER_H_
#define CERTIQ_JOBS_CALL_OBSERVER_H_

#include "absl/status/status.h"

namespace certiq::jobs {

// One of the server's RPCs. The strings are literals of a closed set.
struct RpcMethod {
  // "certiq.v1.QuantizationService"
  const char* service;
  // "Quantize"
  const char* method;
  // "unary", "client_stream", "server_stream" or "bidi_stream".
  const char* type;
};

// The RPCs a server answers; watchers prepare for these and may ignore others.
inline constexpr RpcMethod kQuantizeMethod{"certiq.v1.QuantizationService", "Quantize",
                                           "bidi_stream"};

// Does nothing by default. Thread-safe; handlers do not block.
class CallObserver {
 public:
  virtual ~CallObserver() = default;

  virtual void CallStarted(const RpcMethod& /*method*/) {}
  virtual void MessageReceived(const RpcMethod& /*method*/) {}
  virtual void MessageSent(const RpcMethod& /*method*/) {}
  // The call ended with `code` after so many seconds.
  virtual void CallHandled(const RpcMethod& /*method*/, absl::StatusCode /*code*/,
                           double /*seconds*/) {}
};

inline CallObserver& IgnoreCalls() {
  static CallObserver observer;
  return observer;
}

}  // namespace certiq::jobs

#endif  // CERTIQ_JOBS_CALL_OBSERVER_H_
