// The channel of a client: clear text or TLS, the token on every call.
#ifndef CERTIQ_CLIENT_CPP_SRC_CHANNEL_H_
#define CERTIQ_CLIENT_CPP_SRC_CHANNEL_H_

#include <memory>

#include "absl/status/statusor.h"
#include "certiq/client.h"
#include "grpcpp/channel.h"

namespace certiq {

// Every call of every stub on the channel carries the token; errors are those of Client::Create.
absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const ClientOptions& options);

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_CHANNEL_H_
