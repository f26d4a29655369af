#include "contract/time.h"

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"

namespace certiq::server {

void SetTime(base::UnixMicros time, google::protobuf::Timestamp* to) {
  to->set_seconds(time / kMicros);
  to->set_nanos(static_cast<int32_t>(time % kMicros * 1000));
}

absl::StatusOr<int64_t> ReadDuration(bool has, const google::protobuf::Duration& duration,
                                     absl::string_view field, int64_t least, int64_t unset) {
  if (!has) return unset;
  // Seconds first: their number times a million may not fit.
  const bool sane = duration.seconds() >= 0 && duration.seconds() <= kMaxDurationMicros / kMicros &&
                    duration.nanos() >= 0 && duration.nanos() < 1000000000;
  const int64_t micros = sane ? duration.seconds() * kMicros + duration.nanos() / 1000 : -1;
  if (micros >= least && micros <= kMaxDurationMicros) return micros;
  return base::InvalidField(
      field, absl::StrCat("expected ", static_cast<double>(least) / static_cast<double>(kMicros),
                          " seconds to 365 days, got ", duration.seconds(), " s and ",
                          duration.nanos(), " ns"));
}

}  // namespace certiq::server
