// The engine's entry: a layer in, packed codes and a certificate out.

#ifndef CERTIQ_ENGINE_QUANTIZE_LAYER_H_
#define CERTIQ_ENGINE_QUANTIZE_LAYER_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/certificate.h"
#include "engine/export/packing.h"
#include "engine/gram/layer.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::engine {

struct QuantizedLayer {
  std::vector<ResultTensor> tensors;
  LayerCertificate certificate;
};

// Quantizes a layer. Bit-identical results for the same problem on the same
// instruction set, whatever the executor. No exception leaves it. Errors:
//   INVALID_ARGUMENT     sizes of weights and statistics differ; weights so large that sums leave
//                        float32; a lambda, or sums, so large that a number of the certificate
//                        leaves float64; a scale that its type cannot hold.
//   FAILED_PRECONDITION  all activations are zero (type "ACTIVATIONS"), there are none or fewer
//                        than spec.min_tokens ("TOKENS"); the damping rule needs held-out tokens
//                        and there are none ("HELD_OUT"); sums that no activations have, which
//                        gives a row a squared norm below zero ("SUMS"); every damping attempt
//                        failed and on_failure is kFail ("DAMPING", the attempts in the message).
//   CANCELLED, DEADLINE_EXCEEDED  as the context's cancellation says.
//   RESOURCE_EXHAUSTED   memory ran out.
absl::StatusOr<QuantizedLayer> QuantizeLayer(LayerProblem problem, const RunContext& context);

// Bytes held at the peak of QuantizeLayer, its inputs and result included, as if it shared nothing.
int64_t PeakBytes(const ResolvedSpec& spec, int64_t rows, int64_t features, bool mismatched = false,
                  bool held_out = false);

// The instruction set this library runs on: "x86-64-v2", "-v3" or "-v4".
const char* EngineIsa();
// "MAJOR.MINOR.PATCH".
const char* EngineVersion();

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_QUANTIZE_LAYER_H_
