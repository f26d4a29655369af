#include "contract/time.h"

#include <gtest/gtest.h>

#include "base/status.h"

namespace certiq::server {
namespace {

TEST(TimeTest, DurationsHaveARange) {
  google::protobuf::Duration duration;
  EXPECT_EQ(*ReadDuration(false, duration, "ttl", kMicros, 17), 17);
  duration.set_seconds(int64_t{365} * 24 * 3600);
  EXPECT_EQ(*ReadDuration(true, duration, "ttl", kMicros, 17), kMaxDurationMicros);
  duration.set_nanos(1000);
  EXPECT_EQ(base::FieldOf(ReadDuration(true, duration, "ttl", kMicros, 17).status()), "ttl");
  duration.set_seconds(1);
  duration.set_nanos(1'000'000'000);
  EXPECT_FALSE(ReadDuration(true, duration, "ttl", kMicros, 17).ok());
  duration.set_nanos(1'999);
  EXPECT_EQ(*ReadDuration(true, duration, "ttl", kMicros, 17), kMicros + 1);
}

TEST(TimeTest, TimesAreSecondsAndTheRest) {
  google::protobuf::Timestamp time;
  SetTime(1'500'000'123'456, &time);
  EXPECT_EQ(time.seconds(), 1'500'000);
  EXPECT_EQ(time.nanos(), 123'456'000);
}

}  // namespace
}  // namespace certiq::server
