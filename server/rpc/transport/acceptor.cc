#include "rpc/transport/acceptor.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace certiq::server {
namespace {

// A look at every connection costs a system call each: no more often than this.
constexpr std::chrono::milliseconds kSweepInterval{50};
constexpr std::chrono::seconds kWarnInterval{10};
// How long the thread rests where the system has no descriptor left for it.
constexpr int kRestMs = 50;
// Connections taken of one socket before the others have their turn.
constexpr int kAtOnce = 64;

// Whom connections are counted for; empty for a unix socket.
std::string PeerOf(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET) {
    sockaddr_in v4;
    std::memcpy(&v4, &address, sizeof(v4));
    return {reinterpret_cast<const char*>(&v4.sin_addr), sizeof(v4.sin_addr)};
  }
  if (address.ss_family == AF_INET6) {
    sockaddr_in6 v6;
    std::memcpy(&v6, &address, sizeof(v6));
    const auto* const bytes = reinterpret_cast<const char*>(&v6.sin6_addr);
    // A peer of IPv4 on a socket of both.
    if (IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) return {bytes + 12, 4};
    return {bytes, 8};
  }
  return "";
}

base::FileDescriptor OpenSpare() {
  return base::FileDescriptor(open("/dev/null", O_RDONLY | O_CLOEXEC));
}

ino_t InodeOf(int fd) {
  struct stat found = {};
  return fstat(fd, &found) == 0 && S_ISSOCK(found.st_mode) ? found.st_ino : 0;
}

bool OutOfDescriptors(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

}  // namespace

Acceptor::Acceptor(base::ListeningSockets listening, ConnectionLimits limits, Open open, Hand hand,
                   Warn warn)
    : listening_(std::move(listening)),
      limits_(limits),
      open_(std::move(open)),
      hand_(std::move(hand)),
      warn_(std::move(warn)),
      spare_(OpenSpare()),
      stop_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      thread_([this] { Run(); }) {}

Acceptor::~Acceptor() {
  const uint64_t one = 1;
  // It cannot fail: nothing else was added.
  static_cast<void>(write(stop_.get(), &one, sizeof(one)));
  thread_.join();
}

void Acceptor::Run() {
  std::vector<pollfd> polled;
  polled.push_back({.fd = stop_.get(), .events = POLLIN, .revents = 0});
  for (const base::FileDescriptor& socket : listening_.sockets) {
    polled.push_back({.fd = socket.get(), .events = POLLIN, .revents = 0});
  }
  bool resting = false;
  for (;;) {
    // While it rests it does not look at the sockets, which stay readable.
    const int ready = poll(polled.data(), resting ? 1 : polled.size(), resting ? kRestMs : -1);
    if (ready < 0 && errno != EINTR) resting = true;
    if ((polled[0].revents & POLLIN) != 0) return;
    if (std::exchange(resting, false)) {
      for (const base::FileDescriptor& socket : listening_.sockets) {
        if (!AcceptAll(socket.get())) resting = true;
      }
      continue;
    }
    for (size_t i = 1; i < polled.size(); ++i) {
      if (polled[i].revents != 0 && !AcceptAll(polled[i].fd)) resting = true;
    }
  }
}

bool Acceptor::AcceptAll(int listener) {
  for (int taken = 0; taken < kAtOnce; ++taken) {
    sockaddr_storage address = {};
    socklen_t size = sizeof(address);
    base::FileDescriptor connection(accept4(listener, reinterpret_cast<sockaddr*>(&address), &size,
                                            SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!connection.valid()) {
      // A client that left again is none of the others' business.
      if (errno == EINTR || errno == ECONNABORTED || errno == EPROTO) continue;
      if (!OutOfDescriptors(errno)) return true;
      Refuse("file descriptors have run out");
      spare_.Close();
      // Closed at once, so that its client does not wait.
      base::FileDescriptor(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC)).Close();
      spare_ = OpenSpare();
      if (!spare_.valid()) return false;
      continue;
    }
    const std::string peer = PeerOf(address);
    const int expected = expected_port_;
    if (expected != 0 && base::PortOf(address) == expected) {
      hand_(listener, connection.Release());
    } else if (!open_()) {
      Refuse("the authorities of client certificates cannot be read");
    } else if (HasRoom(peer)) {
      connections_.push_back({connection.get(), InodeOf(connection.get()), peer});
      ++peers_[peer];
      hand_(listener, connection.Release());
    } else {
      Refuse("there are as many as may be open, of all or of one peer");
    }
  }
  return true;
}

bool Acceptor::HasRoom(const std::string& peer) {
  const auto room = [&] {
    const auto found = peers_.find(peer);
    return static_cast<int>(connections_.size()) < limits_.all &&
           (peer.empty() || found == peers_.end() || found->second < limits_.per_peer);
  };
  if (room()) return true;
  Sweep();
  return room();
}

void Acceptor::Sweep() {
  const Clock::time_point now = Clock::now();
  if (now - swept_at_ < kSweepInterval) return;
  swept_at_ = now;
  const auto closed = [this](const Connection& connection) {
    if (InodeOf(connection.fd) == connection.inode) return false;
    const auto peer = peers_.find(connection.peer);
    if (--peer->second == 0) peers_.erase(peer);
    return true;
  };
  connections_.erase(std::remove_if(connections_.begin(), connections_.end(), closed),
                     connections_.end());
}

void Acceptor::Refuse(const std::string& why) {
  ++refused_;
  ++refused_since_;
  const Clock::time_point now = Clock::now();
  if (!warn_ || now - warned_at_ < kWarnInterval) return;
  warned_at_ = now;
  warn_(absl::StrCat(std::exchange(refused_since_, 0), " connections were turned away: ", why));
}

}  // namespace certiq::server
