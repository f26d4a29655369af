// Times and durations of the contract.

#ifndef CERTIQ_CONTRACT_TIME_H_
#define CERTIQ_CONTRACT_TIME_H_

#include <google/protobuf/duration.pb.h>
#include <google/protobuf/timestamp.pb.h>

#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"

namespace certiq::server {

inline constexpr int64_t kMicros = 1000000;
inline constexpr int64_t kMaxDurationMicros = int64_t{365} * 24 * 3600 * kMicros;

void SetTime(base::UnixMicros time, google::protobuf::Timestamp* to);

// Microseconds, `unset` where the message is not there. INVALID_ARGUMENT outside
// [least, 365 days].
absl::StatusOr<int64_t> ReadDuration(bool has, const google::protobuf::Duration& duration,
                                     absl::string_view field, int64_t least, int64_t unset);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_TIME_H_
