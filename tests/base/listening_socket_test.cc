// Listening sockets of every kind of address.

#include "base/listening_socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"

namespace certiq::base {
namespace {

// Whether somebody takes connections at 127.0.0.1 and this port.
bool Answers(int port) {
  const FileDescriptor client(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return connect(client.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
}

bool AnswersAt(const std::string& path) {
  const FileDescriptor client(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  return connect(client.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
}

absl::StatusOr<ListeningSockets> ListenAt(const std::string& text) {
  const absl::StatusOr<Address> address = ParseAddress(text);
  EXPECT_TRUE(address.ok()) << address.status();
  return Listen(*address);
}

TEST(ListeningSocketTest, TakesAFreePort) {
  for (const char* text : {"127.0.0.1:0", "localhost:0", "0.0.0.0:0", ":0"}) {
    const auto listening = ListenAt(text);
    ASSERT_TRUE(listening.ok()) << text << " " << listening.status();
    EXPECT_GT(listening->port, 0) << text;
    EXPECT_TRUE(Answers(listening->port)) << text;
  }
}

TEST(ListeningSocketTest, APortIsTakenOnce) {
  auto first = ListenAt("127.0.0.1:0");
  ASSERT_TRUE(first.ok());
  const std::string same = absl::StrCat("127.0.0.1:", first->port);
  const auto second = ListenAt(same);
  EXPECT_TRUE(absl::IsUnavailable(second.status())) << second.status();
  first->sockets.clear();
  EXPECT_TRUE(ListenAt(same).ok());
}

TEST(ListeningSocketTest, AddressesOfOtherMachinesAreRefused) {
  // 192.0.2.0/24 is for documentation (RFC 5737).
  EXPECT_TRUE(absl::IsUnavailable(ListenAt("192.0.2.1:0").status()));
  EXPECT_TRUE(absl::IsUnavailable(ListenAt("no-such-host.invalid:0").status()));
}

class UnixSocketTest : public ::testing::Test {
 protected:
  UnixSocketTest() { EXPECT_NE(mkdtemp(folder_), nullptr); }
  ~UnixSocketTest() override {
    unlink(path().c_str());
    rmdir(folder_);
  }
  std::string path() const { return absl::StrCat(folder_, "/s"); }

  char folder_[32] = "/tmp/certiq-socket-XXXXXX";
};

TEST_F(UnixSocketTest, ReplacesOneThatWasLeftBehindAndNoOther) {
  const std::string text = "unix:" + path();
  {
    const auto first = ListenAt(text);
    ASSERT_TRUE(first.ok()) << first.status();
    EXPECT_EQ(first->port, 0);
    EXPECT_TRUE(AnswersAt(path()));
    EXPECT_TRUE(absl::IsUnavailable(ListenAt(text).status()));
    EXPECT_TRUE(AnswersAt(path()));
  }
  // The file is there, nobody listens.
  const auto again = ListenAt(text);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_TRUE(AnswersAt(path()));
}

TEST_F(UnixSocketTest, AFileThatIsNoSocketStays) {
  const FileDescriptor file(creat(path().c_str(), 0600));
  ASSERT_TRUE(file.valid());
  EXPECT_FALSE(ListenAt("unix:" + path()).ok());
  struct stat found = {};
  ASSERT_EQ(stat(path().c_str(), &found), 0);
  EXPECT_TRUE(S_ISREG(found.st_mode));
}

TEST_F(UnixSocketTest, PathsHaveALength) {
  EXPECT_TRUE(absl::IsInvalidArgument(ListenAt("unix:/" + std::string(200, 'x')).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ListenAt("unix:").status()));
}

}  // namespace
}  // namespace certiq::base
