// Requests of a Quantize call.

#ifndef CERTIQ_TESTS_SUPPORT_REQUESTS_H_
#define CERTIQ_TESTS_SUPPORT_REQUESTS_H_

#include <cstdint>
#include <vector>

#include "certiq/v1/quantization_service.pb.h"
#include "support/layers.h"

namespace certiq::testing {

v1::QuantizeRequest HeaderFor(const Layer& layer);
v1::QuantizeRequest WeightChunk(const Layer& layer, int64_t begin, int64_t end);
v1::QuantizeRequest ActivationChunk(const Layer& layer, int64_t begin, int64_t end);

// All messages of a call, with so many rows each.
std::vector<v1::QuantizeRequest> QuantizeRequestsFor(const Layer& layer, int64_t rows = 64);

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_SUPPORT_REQUESTS_H_
