// Connection of a client: checked options and a stub.
#ifndef CERTIQ_CLIENT_CPP_SRC_CONNECTION_H_
#define CERTIQ_CLIENT_CPP_SRC_CONNECTION_H_

#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/status_macros.h"
#include "certiq/client.h"
#include "channel.h"

namespace certiq {

// INVALID_ARGUMENT, naming the option, where the address or a limit makes no sense. Fills in what
// a call needs and `*options` leave out.
absl::Status CompleteOptions(ClientOptions* options);

// Thread-safe once made.
template <typename Service>
struct ServiceConnection {
  ClientOptions options;
  std::unique_ptr<typename Service::StubInterface> stub;
};

// Does not connect yet. Errors as those of Client::Create.
template <typename Service>
absl::StatusOr<ServiceConnection<Service>> ConnectTo(ClientOptions options) {
  RETURN_IF_ERROR(CompleteOptions(&options));
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> channel, MakeChannel(options));
  return ServiceConnection<Service>{std::move(options), Service::NewStub(channel)};
}

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_CONNECTION_H_
