// The acceptor: takes connections and hands them on, within limits.

#ifndef CERTIQ_RPC_TRANSPORT_ACCEPTOR_H_
#define CERTIQ_RPC_TRANSPORT_ACCEPTOR_H_

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/file_descriptor.h"
#include "base/listening_socket.h"
#include "rpc/transport/file.h"

namespace certiq::server {

// Of connections that are open at a time.
struct ConnectionLimits {
  int all = 1024;
  // From one address of IPv4 or one /64 network of IPv6; unix sockets know no peers.
  int per_peer = 512;
};

// Accepts on a thread of its own, which outlives every error of accept(2): gRPC's own listener ends
// for ever where file descriptors run out once (CVE-2023-4785). Beyond the limits a connection is
// closed as soon as it is there. Thread-safe.
class Acceptor {
 public:
  // Takes over the connection `fd`, which came over the socket `listener`.
  using Hand = std::function<void(int listener, int fd)>;

  // Whether connections are let in at all just now.
  using Open = std::function<bool()>;

  // Accepts at once. `open` is asked for each connection. `warn` is told, now and then, of those
  // that are turned away.
  Acceptor(base::ListeningSockets listening, ConnectionLimits limits, Open open, Hand hand,
           Warn warn);
  // Closes the sockets; connections go on.
  ~Acceptor();
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  int port() const { return listening_.port; }
  // Connections that were turned away.
  int64_t refused() const { return refused_; }
  // A connection from this port is let in whatever the limits: the server's own probe.
  void Expect(int port) { expected_port_ = port; }

 private:
  using Clock = std::chrono::steady_clock;
  // A connection that was handed on. Who has it closes it without a word: then its number stands
  // for nothing, or for another file.
  struct Connection {
    int fd = -1;
    ino_t inode = 0;
    std::string peer;
  };

  void Run();
  // Takes what waits on one socket; false where descriptors have run out.
  bool AcceptAll(int listener);
  // Whether one more of this peer is within the limits.
  bool HasRoom(const std::string& peer);
  // Forgets connections that are closed.
  void Sweep();
  void Refuse(const std::string& why);

  const base::ListeningSockets listening_;
  const ConnectionLimits limits_;
  const Open open_;
  const Hand hand_;
  const Warn warn_;
  std::atomic<int> expected_port_{0};
  std::atomic<int64_t> refused_{0};

  // The thread's.
  std::vector<Connection> connections_;
  std::map<std::string, int> peers_;
  Clock::time_point swept_at_;
  Clock::time_point warned_at_;
  int64_t refused_since_ = 0;
  // Given up for a moment where descriptors run out, to take a connection and close it.
  base::FileDescriptor spare_;

  // Readable once the thread is to end.
  base::FileDescriptor stop_;
  // Last: it uses the rest.
  std::thread thread_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_TRANSPORT_ACCEPTOR_H_
