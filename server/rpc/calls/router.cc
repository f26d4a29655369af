#include "rpc/calls/router.h"

#include <grpcpp/support/server_callback.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/exception_guard.h"
#include "rpc/calls/grpc_status.h"

namespace certiq::server {
namespace {

// A call that ends at once and is no method's.
class Refused final : public grpc::ServerGenericBidiReactor {
 public:
  explicit Refused(const absl::Status& status) { Finish(ToGrpc(status)); }
  void OnDone() override { delete this; }
};

// Takes what a call may hold from whom it is charged to.
absl::StatusOr<ByteBudget::Reservation> Hold(const CallEnvironment& environment,
                                             const OfferedMethod& method, const Tenant& tenant) {
  auto held = StreamsAnswers(method.method.shape)
                  ? environment.environment.quotas.Of(tenant).answers.TryReserve(
                        method.limits.held_bytes, "this call")
                  : environment.budget.Take(tenant.name, method.limits.held_bytes);
  if (!held.ok()) environment.environment.observer.Rejected(Rejection::kOverBudget);
  return held;
}

Call* MakeCall(const CallEnvironment& environment, grpc::CallbackServerContext* context,
               const OfferedMethod& method) {
  CallStart start{.context = context,
                  .environment = environment,
                  .method = method.method,
                  .limits = method.limits,
                  .caller = {},
                  .refused = absl::OkStatus(),
                  .held = {}};
  absl::StatusOr<Caller> caller = environment.auth->Authenticate(*context, method.scope);
  start.refused = caller.status();
  if (caller.ok()) {
    start.caller = *std::move(caller);
    absl::StatusOr<ByteBudget::Reservation> held = Hold(environment, method, start.caller.tenant);
    start.refused = held.status();
    if (held.ok()) start.held = *std::move(held);
  }
  return method.make(std::move(start));
}

}  // namespace

// What generated code makes of a service, but for the shapes.
class Router::Service final : public grpc::Service {
 public:
  void Offer(const Router& router, const OfferedMethod& method) {
    paths_.push_back(std::make_unique<const std::string>(
        absl::StrCat("/", method.method.service, "/", method.method.method)));
    // gRPC keeps the pointer to the path, and owns the others.
    AddMethod(new grpc::internal::RpcServiceMethod(
        paths_.back()->c_str(), grpc::internal::RpcMethod::BIDI_STREAMING, nullptr));
    MarkMethodRawCallback(static_cast<int>(paths_.size()) - 1,
                          new grpc::internal::CallbackBidiHandler<Bytes, Bytes>(
                              [&router, &method](grpc::CallbackServerContext* context) {
                                return router.Start(context, method);
                              }));
  }

 private:
  std::vector<std::unique_ptr<const std::string>> paths_;
};

void Router::Register(grpc::ServerBuilder& builder) {
  for (const auto& method : methods_) {
    std::unique_ptr<grpc::Service>& service = services_[method->method.service];
    if (service == nullptr) service = std::make_unique<Service>();
    static_cast<Service&>(*service).Offer(*this, *method);
  }
  for (const auto& [name, service] : services_) builder.RegisterService(service.get());
}

grpc::ServerGenericBidiReactor* Router::Start(grpc::CallbackServerContext* context,
                                              const OfferedMethod& method) const {
  Call* call = nullptr;
  // An exception must not reach gRPC's thread, which would answer that there is no such method.
  const absl::Status made = base::RunGuarded([&] {
    call = MakeCall(env_, context, method);
    return absl::OkStatus();
  });
  if (call == nullptr) return new Refused(made);
  call->Begin();
  return call;
}

}  // namespace certiq::server
