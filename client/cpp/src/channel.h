// What every client of the library is made from: checked options and a channel.
#ifndef CERTIQ_CLIENT_CPP_SRC_CHANNEL_H_
#define CERTIQ_CLIENT_CPP_SRC_CHANNEL_H_

#include <memory>
#include <utility>

#include "absl/status/statusor.h"
#include "certiq/client.h"
#include "grpcpp/channel.h"

namespace certiq {

// Does not connect yet. Fills in what a call needs and `*options` leave out. Errors as those of
// Client::Create.
absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(ClientOptions* options);

// Thread-safe once made.
template <typename Service>
struct ServiceConnection {
  ClientOptions options;
  std::unique_ptr<typename Service::StubInterface> stub;
};

// Errors as MakeChannel.
template <typename Service>
absl::StatusOr<ServiceConnection<Service>> ConnectTo(ClientOptions options) {
  const absl::StatusOr<std::shared_ptr<grpc::Channel>> channel = MakeChannel(&options);
  if (!channel.ok()) return channel.status();
  return ServiceConnection<Service>{std::move(options), Service::NewStub(*channel)};
}

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_CHANNEL_H_
