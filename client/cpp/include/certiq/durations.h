// Conversion of durations to the contract's type.
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_DURATIONS_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_DURATIONS_H_

#include <cstdint>

#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"

namespace certiq {

inline google::protobuf::Duration ToProto(absl::Duration duration) {
  google::protobuf::Duration proto;
  proto.set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  proto.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
  return proto;
}

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_DURATIONS_H_
