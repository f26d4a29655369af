// Listening sockets.

#ifndef CERTIQ_BASE_LISTENING_SOCKET_H_
#define CERTIQ_BASE_LISTENING_SOCKET_H_

#include <sys/socket.h>

#include <vector>

#include "absl/status/statusor.h"
#include "base/address.h"
#include "base/file_descriptor.h"

namespace certiq::base {

struct ListeningSockets {
  // Not blocking; at least one. A name may stand for several addresses.
  std::vector<FileDescriptor> sockets;
  // Of all of them, also where port 0 was asked for; 0 for unix.
  int port = 0;
};

// The port of an address of IPv4 or IPv6; 0 of any other.
int PortOf(const sockaddr_storage& address);

// Listens on every address that the host stands for, all of them on one port; an empty host,
// 0.0.0.0 and :: stand for every address of the machine. A unix socket that nobody listens on any
// more is replaced. UNAVAILABLE where the port is in use or the address is not one of this machine.
absl::StatusOr<ListeningSockets> Listen(const Address& address);

}  // namespace certiq::base

#endif  // CERTIQ_BASE_LISTENING_SOCKET_H_
