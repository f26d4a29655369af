// The summary of a call, for its log line.

#ifndef CERTIQ_RPC_CALLS_CALL_SUMMARY_H_
#define CERTIQ_RPC_CALLS_CALL_SUMMARY_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"

namespace certiq::server {

struct CallSummary {
  // Literal: "Quantize".
  const char* method = "";
  // Whose call it was; empty without tokens, and where it was refused for want of one.
  std::string tenant;
  // As the client sent them, at most a few hundred bytes of any UTF-8.
  std::string request_id;
  std::string layer_name;
  // Set where the call is about a calibration or a job.
  std::string calibration_id;
  std::string stream_id;
  std::string job_id;
  // 0 where no header came.
  int64_t rows = 0;
  int64_t features = 0;
  int64_t tokens = 0;
  int64_t received_bytes = 0;
  int64_t sent_bytes = 0;
  double seconds = 0;
  absl::Status status;
};

// Called once a call, from any thread; does not block.
using CallLog = std::function<void(const CallSummary&)>;

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_CALL_SUMMARY_H_
