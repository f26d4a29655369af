// The router: knows the method of a call, and its caller, before anything of it is read.

#ifndef CERTIQ_RPC_CALLS_ROUTER_H_
#define CERTIQ_RPC_CALLS_ROUTER_H_

#include <grpcpp/impl/service_type.h>
#include <grpcpp/server_builder.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "rpc/calls/call.h"
#include "rpc/calls/call_life.h"

namespace certiq::server {

// A method that the server offers.
struct OfferedMethod {
  RpcMethod method;
  Scope scope = Scope::kWrite;
  CallLimits limits = {};
  // Makes a call of it. gRPC owns the call until its OnDone.
  std::function<Call*(CallStart)> make;
};

// Serves every method as a stream of byte buffers in both directions, whatever its shape: gRPC then
// reads nothing by itself, so that of a caller without a token that serves only the headers are
// ever held. Such a caller gets its refusal, counted and logged like any other call's end. Methods
// are added before the server starts; after that it is thread-safe. It outlives the server.
class Router {
 public:
  explicit Router(const CallEnvironment& environment) : env_(environment) {}

  // For calls that C makes of a CallStart and `more`.
  template <typename C, typename... More>
  void Add(const RpcMethod& method, Scope scope, const CallLimits& limits, More... more) {
    methods_.push_back(std::make_unique<OfferedMethod>(OfferedMethod{
        .method = method,
        .scope = scope,
        .limits = limits,
        .make = [more...](CallStart start) -> Call* { return new C(std::move(start), more...); }}));
  }

  // Registers the services whose methods were added.
  void Register(grpc::ServerBuilder& builder);

 private:
  class Service;

  grpc::ServerGenericBidiReactor* Start(grpc::CallbackServerContext* context,
                                        const OfferedMethod& method) const;

  const CallEnvironment& env_;
  std::vector<std::unique_ptr<const OfferedMethod>> methods_;
  // By their names.
  std::map<std::string, std::unique_ptr<grpc::Service>> services_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_ROUTER_H_
