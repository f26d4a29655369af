#include "rpc/transport/probe.h"

#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>
#include <netdb.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <system_error>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/address.h"
#include "base/file_descriptor.h"
#include "base/listening_socket.h"
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

absl::Status NoAnswer(absl::string_view what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", std::generic_category().message(errno)));
}

// A socket whose connection `connect` would make; it waits for nothing longer than `limit`.
absl::StatusOr<base::FileDescriptor> OpenSocket(int family, std::chrono::milliseconds limit) {
  base::FileDescriptor opened(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!opened.valid()) return NoAnswer("no socket");
  const timeval wait = {.tv_sec = limit.count() / 1000, .tv_usec = limit.count() % 1000 * 1000};
  for (const int option : {SO_RCVTIMEO, SO_SNDTIMEO}) {
    setsockopt(opened.get(), SOL_SOCKET, option, &wait, sizeof(wait));
  }
  return opened;
}

absl::StatusOr<base::FileDescriptor> ConnectToPath(const std::string& path,
                                                   std::chrono::milliseconds limit) {
  ASSIGN_OR_RETURN(base::FileDescriptor opened, OpenSocket(AF_UNIX, limit));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  if (connect(opened.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return NoAnswer("cannot connect");
  }
  return opened;
}

absl::StatusOr<base::FileDescriptor> ConnectToHost(const base::Address& address,
                                                   std::chrono::milliseconds limit,
                                                   const std::function<void(int)>& connecting) {
  const bool any = address.host.empty() || address.host == "0.0.0.0";
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(any ? "127.0.0.1" : address.host.c_str(), std::to_string(address.port).c_str(),
                  &hints, &found) != 0) {
    return absl::UnavailableError(absl::StrCat(address.host, " is not known"));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  ASSIGN_OR_RETURN(base::FileDescriptor opened, OpenSocket(list->ai_family, limit));
  // Any address, and a port that is known before the connection is there.
  sockaddr_storage from = {};
  from.ss_family = static_cast<sa_family_t>(list->ai_family);
  socklen_t size = list->ai_addrlen;
  if (bind(opened.get(), reinterpret_cast<const sockaddr*>(&from), size) != 0 ||
      getsockname(opened.get(), reinterpret_cast<sockaddr*>(&from), &size) != 0) {
    return NoAnswer("no port");
  }
  connecting(base::PortOf(from));
  if (connect(opened.get(), list->ai_addr, list->ai_addrlen) != 0) {
    return NoAnswer("cannot connect");
  }
  return opened;
}

absl::Status AnswersHttp2(int fd) {
  // The preface of a client and its SETTINGS, empty (RFC 9113, 3.4).
  constexpr char kHello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0";
  if (send(fd, kHello, sizeof(kHello), MSG_NOSIGNAL) != sizeof(kHello))
    return NoAnswer("cannot send");
  char answer[9];
  const ssize_t got = recv(fd, answer, sizeof(answer), MSG_WAITALL);
  if (got != sizeof(answer))
    return got < 0 ? NoAnswer("no answer") : absl::UnavailableError("closed");
  constexpr char kSettings = 4;
  return answer[3] == kSettings ? absl::OkStatus() : absl::UnavailableError("it speaks no HTTP/2");
}

absl::Status AnswersTls(int fd) {
  const std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)> context(SSL_CTX_new(TLS_client_method()),
                                                                  &SSL_CTX_free);
  if (context == nullptr) return absl::InternalError("TLS is not available");
  const std::unique_ptr<SSL, decltype(&SSL_free)> tls(SSL_new(context.get()), &SSL_free);
  if (tls == nullptr || SSL_set_fd(tls.get(), fd) != 1) {
    return absl::InternalError("TLS is not available");
  }
  const int connected = SSL_connect(tls.get());
  const int error = connected == 1 ? SSL_ERROR_NONE : SSL_get_error(tls.get(), connected);
  ERR_clear_error();
  // An alert, such as for want of a certificate, is an answer.
  if (error == SSL_ERROR_NONE || error == SSL_ERROR_SSL) return absl::OkStatus();
  return absl::UnavailableError("no TLS handshake");
}

}  // namespace

absl::Status ProbeListener(const base::Address& address, bool tls, std::chrono::milliseconds limit,
                           const std::function<void(int)>& connecting) {
  if (address.is_unix()) connecting(0);
  ASSIGN_OR_RETURN(const base::FileDescriptor connection,
                   address.is_unix() ? ConnectToPath(address.host, limit)
                                     : ConnectToHost(address, limit, connecting));
  return tls ? AnswersTls(connection.get()) : AnswersHttp2(connection.get());
}

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
