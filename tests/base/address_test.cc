#include "base/address.h"

#include <gtest/gtest.h>

namespace certiq::base {
namespace {

TEST(AddressTest, Parses) {
  EXPECT_EQ(ParseAddress("127.0.0.1:8470")->host, "127.0.0.1");
  EXPECT_EQ(ParseAddress("127.0.0.1:8470")->port, 8470);
  EXPECT_EQ(ParseAddress("[::1]:0")->host, "::1");
  EXPECT_TRUE(ParseAddress("unix:/run/certiq.sock")->is_unix());
  EXPECT_EQ(ParseAddress(":1")->host, "");
}

TEST(AddressTest, RefusesWhatIsNone) {
  for (const char* text : {"", "8470", "host", "host:", "host:x", "host:-1", "host:65536", "::1:80",
                           "host:99999999999999999999", "host:1 "}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseAddress(text).status())) << text;
  }
}

TEST(AddressTest, KnowsLoopback) {
  for (const char* text : {"127.0.0.1:1", "127.9.8.7:1", "[::1]:1", "localhost:1", "unix:/x"}) {
    EXPECT_TRUE(IsLoopback(*ParseAddress(text))) << text;
  }
  for (const char* text : {"0.0.0.0:1", "[::]:1", "10.0.0.1:1", ":1", "128.0.0.1:1"}) {
    EXPECT_FALSE(IsLoopback(*ParseAddress(text))) << text;
  }
}

TEST(AddressTest, DialsLoopbackForAny) {
  const auto dial = [](const char* text) { return DialTarget(*ParseAddress(text)); };
  EXPECT_EQ(dial("0.0.0.0:7"), "127.0.0.1:7");
  EXPECT_EQ(dial("[::]:7"), "[::1]:7");
  EXPECT_EQ(dial("127.0.0.2:7"), "127.0.0.2:7");
  EXPECT_EQ(dial("unix:/x"), "unix:/x");
  EXPECT_EQ(dial("[fe80::1]:7"), "[fe80::1]:7");
}

}  // namespace
}  // namespace certiq::base
