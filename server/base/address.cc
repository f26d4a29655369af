#include "base/address.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cstring>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace certiq::base {
namespace {

bool IsLoopback(const sockaddr& address) {
  if (address.sa_family == AF_INET) {
    sockaddr_in v4;
    std::memcpy(&v4, &address, sizeof(v4));
    return (ntohl(v4.sin_addr.s_addr) >> 24) == 127;
  }
  if (address.sa_family == AF_INET6) {
    sockaddr_in6 v6;
    std::memcpy(&v6, &address, sizeof(v6));
    return IN6_IS_ADDR_LOOPBACK(&v6.sin6_addr);
  }
  return false;
}

}  // namespace

absl::StatusOr<Address> ParseAddress(const std::string& text) {
  if (text.rfind("unix:", 0) == 0) return Address{text.substr(5), -1};
  const auto wrong = [&text] {
    return absl::InvalidArgumentError(absl::StrCat(
        "expected HOST:PORT, [IPV6]:PORT or unix:PATH with a port of 0 to 65535, got \"", text,
        "\""));
  };
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos) return wrong();
  std::string host = text.substr(0, colon);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != std::string::npos) {
    return wrong();
  }
  int port = 0;
  const std::string digits = text.substr(colon + 1);
  if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos ||
      !absl::SimpleAtoi(digits, &port) || port > 65535) {
    return wrong();
  }
  return Address{host, port};
}

bool IsLoopback(const Address& address) {
  if (address.is_unix() || address.host == "localhost") return true;
  if (address.host.empty()) return false;
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(address.host.c_str(), nullptr, &hints, &found) != 0) return false;
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  for (const addrinfo* entry = list.get(); entry != nullptr; entry = entry->ai_next) {
    if (!IsLoopback(*entry->ai_addr)) return false;
  }
  return found != nullptr;
}

std::string DialTarget(const Address& address) {
  if (address.is_unix()) return absl::StrCat("unix:", address.host);
  if (address.host.empty() || address.host == "0.0.0.0") {
    return absl::StrCat("127.0.0.1:", address.port);
  }
  if (address.host == "::") return absl::StrCat("[::1]:", address.port);
  const bool v6 = address.host.find(':') != std::string::npos;
  return absl::StrCat(v6 ? "[" : "", address.host, v6 ? "]:" : ":", address.port);
}

}  // namespace certiq::base
