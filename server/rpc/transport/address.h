// Addresses to listen on.

#ifndef CERTIQ_RPC_TRANSPORT_ADDRESS_H_
#define CERTIQ_RPC_TRANSPORT_ADDRESS_H_

#include <string>

#include "absl/status/statusor.h"

namespace certiq::server {

// HOST:PORT, [IPV6]:PORT or unix:PATH. `port` is -1 for unix.
struct Address {
  std::string host;
  int port = -1;
  bool is_unix() const { return port < 0; }
};

// INVALID_ARGUMENT saying what was expected.
absl::StatusOr<Address> ParseAddress(const std::string& text);

// Whether only this machine can reach it: unix sockets, localhost, 127.0.0.0/8, ::1, and names
// that resolve to nothing else.
bool IsLoopback(const Address& address);

// Where a client on this machine finds a server that listens on `address`:
// the loopback address in place of "any".
std::string DialTarget(const Address& address, const std::string& text);

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_ADDRESS_H_
