#include "base/listening_socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace certiq::base {
namespace {

// Connections that may wait to be accepted.
constexpr int kBacklog = 1024;

absl::Status CannotListen(int error) {
  return absl::UnavailableError(
      absl::StrCat("the port is in use or the address is not one of this machine (",
                   std::generic_category().message(error), ")"));
}

void SetPort(sockaddr_storage& address, int port) {
  const auto network = htons(static_cast<uint16_t>(port));
  if (address.ss_family == AF_INET) {
    sockaddr_in v4;
    std::memcpy(&v4, &address, sizeof(v4));
    v4.sin_port = network;
    std::memcpy(&address, &v4, sizeof(v4));
  } else {
    sockaddr_in6 v6;
    std::memcpy(&v6, &address, sizeof(v6));
    v6.sin6_port = network;
    std::memcpy(&address, &v6, sizeof(v6));
  }
}

absl::StatusOr<FileDescriptor> ListenOn(const sockaddr* address, socklen_t size) {
  FileDescriptor socket(
      ::socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket.valid()) return CannotListen(errno);
  const int on = 1;
  if (address->sa_family != AF_UNIX) {
    // A port whose last connections have not timed out yet may be taken again.
    setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    // Connections inherit it.
    setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  }
  if (address->sa_family == AF_INET6) {
    sockaddr_in6 v6;
    std::memcpy(&v6, address, sizeof(v6));
    // "Every address" includes those of IPv4.
    const int only = IN6_IS_ADDR_UNSPECIFIED(&v6.sin6_addr) ? 0 : 1;
    setsockopt(socket.get(), IPPROTO_IPV6, IPV6_V6ONLY, &only, sizeof(only));
  }
  if (bind(socket.get(), address, size) != 0 || listen(socket.get(), kBacklog) != 0) {
    return CannotListen(errno);
  }
  return socket;
}

absl::StatusOr<ListeningSockets> ListenOnPath(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "expected a path of 1 to ", sizeof(address.sun_path) - 1, " bytes, got ", path.size()));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  const auto* const generic = reinterpret_cast<const sockaddr*>(&address);
  {
    const FileDescriptor probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const int found = connect(probe.get(), generic, sizeof(address)) == 0 ? 0 : errno;
    if (found == 0) return CannotListen(EADDRINUSE);
    // A socket that a process left behind, and nothing else.
    struct stat file = {};
    if (found == ECONNREFUSED && lstat(path.c_str(), &file) == 0 && S_ISSOCK(file.st_mode)) {
      unlink(path.c_str());
    }
  }
  ListeningSockets listening;
  ASSIGN_OR_RETURN(FileDescriptor socket, ListenOn(generic, sizeof(address)));
  listening.sockets.push_back(std::move(socket));
  return listening;
}

}  // namespace

int PortOf(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET) {
    sockaddr_in v4;
    std::memcpy(&v4, &address, sizeof(v4));
    return ntohs(v4.sin_port);
  }
  if (address.ss_family != AF_INET6) return 0;
  sockaddr_in6 v6;
  std::memcpy(&v6, &address, sizeof(v6));
  return ntohs(v6.sin6_port);
}

absl::StatusOr<ListeningSockets> Listen(const Address& address) {
  if (address.is_unix()) return ListenOnPath(address.host);
  const bool any = address.host.empty() || address.host == "0.0.0.0";
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  // "::" first: where there is IPv6, one socket serves both.
  if (getaddrinfo(any ? nullptr : address.host.c_str(), "0", &hints, &found) != 0) {
    return CannotListen(EADDRNOTAVAIL);
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  ListeningSockets listening;
  listening.port = address.port;
  absl::Status failed = CannotListen(EADDRNOTAVAIL);
  const auto add = [&](const addrinfo& entry) {
    sockaddr_storage at = {};
    std::memcpy(&at, entry.ai_addr, entry.ai_addrlen);
    SetPort(at, listening.port);
    absl::StatusOr<FileDescriptor> socket =
        ListenOn(reinterpret_cast<const sockaddr*>(&at), entry.ai_addrlen);
    if (!socket.ok()) {
      failed = socket.status();
      return;
    }
    socklen_t size = sizeof(at);
    if (getsockname(socket->get(), reinterpret_cast<sockaddr*>(&at), &size) == 0) {
      listening.port = PortOf(at);
    }
    listening.sockets.push_back(*std::move(socket));
  };
  for (const int family : {AF_INET6, AF_INET}) {
    // One socket for every address is enough.
    if (any && !listening.sockets.empty()) break;
    for (const addrinfo* entry = list.get(); entry != nullptr; entry = entry->ai_next) {
      if (entry->ai_family == family) add(*entry);
    }
  }
  if (listening.sockets.empty()) return failed;
  return listening;
}

}  // namespace certiq::base
