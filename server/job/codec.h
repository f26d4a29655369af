// Between what is kept of a job and what the contract says of it.

#ifndef CERTIQ_JOB_CODEC_H_
#define CERTIQ_JOB_CODEC_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/certificate.h"
#include "engine/export/packing.h"
#include "engine/spec.h"

namespace certiq::server {

// What a certificate tells that the engine does not know. Digests are empty where nothing was sent.
struct CallFacts {
  std::string weights_sha256;
  std::string x_sha256;
  std::string x_quantized_sha256;
  std::string calibration_id;
  std::string sums_sha256;
  double held_out_fraction = 0;
  int64_t held_out_block_rows = 0;
  double receive_seconds = 0;
  double queue_seconds = 0;
};

// Implemented by rpc/, which knows the contract's messages; here they are opaque. Thread-safe.
class Codec {
 public:
  virtual ~Codec() = default;
  virtual absl::StatusOr<engine::ResolvedSpec> DecodeSpec(const std::string& spec) const = 0;
  virtual std::string EncodeError(const absl::Status& error) const = 0;
  virtual std::string EncodeHeader(const std::vector<engine::ResultTensor>& tensors) const = 0;
  // In parts that are sent as they are, one after the other.
  virtual std::vector<std::string> EncodeCertificate(const engine::LayerCertificate& certificate,
                                                     const CallFacts& facts) const = 0;
};

}  // namespace certiq::server

#endif  // CERTIQ_JOB_CODEC_H_
