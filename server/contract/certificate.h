// Results as messages: certificates and the headers of their tensors.

#ifndef CERTIQ_CONTRACT_CERTIFICATE_H_
#define CERTIQ_CONTRACT_CERTIFICATE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "certiq/v1/certificate.pb.h"
#include "certiq/v1/quantization_service.pb.h"
#include "engine/certificate.h"
#include "engine/export/packing.h"

namespace certiq::server {

// What a certificate tells that the engine does not know. Digests are lowercase hex, empty where
// nothing was sent.
struct CertificateFacts {
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

// Rows whose error and bound go into one message: 1 MiB of them.
inline constexpr int64_t kCertificateRows = 65536;

// The certificate in messages that merge, in order, into the whole.
std::vector<v1::Certificate> ToProto(const engine::LayerCertificate& certificate,
                                     const CertificateFacts& facts,
                                     int64_t rows_per_message = kCertificateRows);

v1::ResultHeader ToProto(const std::vector<engine::ResultTensor>& tensors);

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_CERTIFICATE_H_
