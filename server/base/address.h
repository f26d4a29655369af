// Listening addresses: parsing, loopback check, dial target.

#ifndef CERTIQ_BASE_ADDRESS_H_
#define CERTIQ_BASE_ADDRESS_H_

#include <string>

#include "absl/status/statusor.h"

namespace certiq::base {

// HOST:PORT, [IPV6]:PORT or unix:PATH. `port` is -1 for unix.
struct Address {
  std::string host;
  int port = -1;
  bool is_unix() const { return port < 0; }
};

// INVALID_ARGUMENT with the expected form.
absl::StatusOr<Address> ParseAddress(const std::string& text);

// True if only this machine can reach the address: unix sockets, localhost, 127.0.0.0/8, ::1, and
// names that resolve to these alone.
bool IsLoopback(const Address& address);

// The target that a client on this machine dials for a server that listens on `address`: the
// loopback address instead of "any".
std::string DialTarget(const Address& address);

}  // namespace certiq::base

#endif  // CERTIQ_BASE_ADDRESS_H_
