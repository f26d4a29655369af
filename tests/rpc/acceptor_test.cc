// Connections within limits, and what is beyond them.

#include "rpc/transport/acceptor.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/address.h"
#include "certificates.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

using base::FileDescriptor;
using server::Acceptor;

class AcceptorTest : public ::testing::Test {
 protected:
  void Start(const server::ConnectionLimits& limits) {
    auto listening = base::Listen(*base::ParseAddress("0.0.0.0:0"));
    ASSERT_TRUE(listening.ok()) << listening.status();
    acceptor_ = std::make_unique<Acceptor>(
        *std::move(listening), limits, [this] { return open_.load(); },
        [this](int /*listener*/, int fd) {
          const std::lock_guard lock(mu_);
          taken_.emplace_back(fd);
        },
        warnings_.Sink());
  }
  // A connection from 127.0.0.<host>.
  FileDescriptor Connect(int host = 1) const {
    FileDescriptor client(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl((127U << 24) | static_cast<unsigned>(host));
    EXPECT_EQ(bind(client.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(acceptor_->port()));
    EXPECT_EQ(connect(client.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)),
              0);
    return client;
  }
  // Whether the server has closed it.
  static bool Closed(const FileDescriptor& client) {
    const timeval limit = {.tv_sec = 60, .tv_usec = 0};
    setsockopt(client.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
    std::array<char, 1> byte;
    return recv(client.get(), byte.data(), byte.size(), 0) <= 0 && errno != EAGAIN;
  }
  size_t taken() {
    const std::lock_guard lock(mu_);
    return taken_.size();
  }
  bool Took(size_t connections) {
    return TestServer::Eventually([&] { return taken() == connections; });
  }
  void CloseTaken() {
    const std::lock_guard lock(mu_);
    taken_.clear();
  }

  Warnings warnings_;
  std::atomic<bool> open_{true};
  std::mutex mu_;
  std::vector<FileDescriptor> taken_;  // guarded by mu_
  std::unique_ptr<Acceptor> acceptor_;
};

TEST_F(AcceptorTest, HandsConnectionsOn) {
  Start({});
  std::vector<FileDescriptor> clients;
  clients.reserve(10);
  for (int i = 0; i < 10; ++i) clients.push_back(Connect());
  EXPECT_TRUE(Took(10));
  EXPECT_EQ(acceptor_->refused(), 0);
  acceptor_.reset();
  // They live on.
  EXPECT_EQ(taken(), 10U);
  EXPECT_EQ(send(clients[0].get(), "x", 1, 0), 1);
}

TEST_F(AcceptorTest, NoMoreThanTheLimitAtATime) {
  Start({.all = 4, .per_peer = 4});
  std::vector<FileDescriptor> clients;
  clients.reserve(4);
  for (int i = 0; i < 4; ++i) clients.push_back(Connect());
  EXPECT_TRUE(Took(4));
  for (int i = 0; i < 10; ++i) EXPECT_TRUE(Closed(Connect()));
  EXPECT_EQ(taken(), 4U);
  EXPECT_EQ(acceptor_->refused(), 10);
  EXPECT_EQ(warnings_.all().size(), 1U);
  // Whoever has them closes them; then there is room again.
  CloseTaken();
  EXPECT_TRUE(TestServer::Eventually([&] {
    clients.push_back(Connect());
    return taken() > 0;
  }));
}

TEST_F(AcceptorTest, OnePeerLeavesRoomForOthers) {
  Start({.all = 100, .per_peer = 3});
  std::vector<FileDescriptor> clients;
  clients.reserve(6);
  for (int i = 0; i < 3; ++i) clients.push_back(Connect(1));
  EXPECT_TRUE(Took(3));
  EXPECT_TRUE(Closed(Connect(1)));
  for (int i = 0; i < 3; ++i) clients.push_back(Connect(2));
  EXPECT_TRUE(Took(6));
  EXPECT_TRUE(Closed(Connect(2)));
}

TEST_F(AcceptorTest, ClosedForAWhile) {
  Start({});
  open_ = false;
  EXPECT_TRUE(Closed(Connect()));
  open_ = true;
  const FileDescriptor client = Connect();
  EXPECT_TRUE(Took(1));
}

// CVE-2023-4785: a listener that ends for ever.
TEST_F(AcceptorTest, OutlivesDescriptorsThatRunOut) {
  Start({});
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  FileDescriptor waiting = Connect();
  EXPECT_TRUE(Took(1));
  std::vector<FileDescriptor> clients;
  clients.reserve(20);
  for (int i = 0; i < 20; ++i) {
    clients.emplace_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  }
  // Every descriptor that is free from now on is above the limit.
  const rlimit low = {.rlim_cur = static_cast<rlim_t>(clients.back().get()),
                      .rlim_max = before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &low), 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(acceptor_->port()));
  for (const FileDescriptor& client : clients) {
    EXPECT_EQ(connect(client.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)),
              0);
  }
  EXPECT_TRUE(TestServer::Eventually([&] { return acceptor_->refused() > 0; }));
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  clients.clear();
  CloseTaken();
  // New connections are taken as before.
  EXPECT_TRUE(TestServer::Eventually([&] {
    const FileDescriptor client = Connect();
    return TestServer::Eventually([&] { return taken() > 0; });
  }));
}

}  // namespace
}  // namespace certiq::testing
