#include "rpc/transport/probe.h"

#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/address.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

// HealthCheckResponse is {enum status = 1} and HealthCheckRequest, for the server as a whole, is an
// empty message. The bytes are read by hand: that takes less than a copy of the proto.
constexpr uint8_t kStatusTag = 1 << 3;
constexpr uint8_t kServing = 1;

bool IsServing(const grpc::ByteBuffer& response) {
  grpc::Slice bytes;
  return response.DumpToSingleSlice(&bytes).ok() && bytes.size() == 2 &&
         bytes.begin()[0] == kStatusTag && bytes.begin()[1] == kServing;
}

}  // namespace

absl::Status Probe(const std::string& listen, const TlsFiles& tls,
                   std::chrono::milliseconds limit) {
  ASSIGN_OR_RETURN(const base::Address address, base::ParseAddress(listen));
  ASSIGN_OR_RETURN(const std::shared_ptr<grpc::ChannelCredentials> credentials,
                   ProbeCredentials(tls));
  grpc::ChannelArguments arguments;
  // A proxy that the environment names does not reach this machine's own servers.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // A connection of its own, made now.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  grpc::GenericStub stub(
      grpc::CreateCustomChannel(base::DialTarget(address), credentials, arguments));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + limit);
  // One empty slice: a buffer without slices would not count as a message.
  grpc::Slice nothing;
  const grpc::ByteBuffer request(&nothing, 1);
  grpc::CompletionQueue queue;
  const std::unique_ptr<grpc::GenericClientAsyncResponseReader> call =
      stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  // The call's deadline bounds the wait.
  queue.Next(&tag, &ok);
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
  if (!status.ok()) {
    return absl::UnavailableError(absl::StrCat(listen, ": ", status.error_message()));
  }
  if (!IsServing(response)) return absl::UnavailableError(absl::StrCat(listen, ": not serving"));
  return absl::OkStatus();
}

}  // namespace certiq::server
