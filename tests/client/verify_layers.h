// Quantized layers with certificates of the engine itself.
#ifndef CERTIQ_TESTS_CLIENT_VERIFY_LAYERS_H_
#define CERTIQ_TESTS_CLIENT_VERIFY_LAYERS_H_

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "certiq/tensor.h"
#include "certiq/v1/certificate.pb.h"
#include "engine/quantize_layer.h"
#include "verify.h"

namespace certiq::testing {

struct LayerOptions {
  int64_t rows = 24;
  int64_t features = 40;
  int64_t tokens = 160;
  bool mismatched = false;
  // Weights of a row's features [first, last) that are multiplied by a factor.
  struct SmallWeights {
    int64_t row = 0;
    double factor = 1;
    int64_t first = 0;
    int64_t last = std::numeric_limits<int64_t>::max();
  };
  std::vector<SmallWeights> small = {};
  // Features whose activations are zero.
  std::vector<int64_t> dead = {};
  double held_out_fraction = 0;
  int64_t sequence_rows = 0;
  // The stream that the split is for; empty for a call that brings its activations.
  std::string stream_id = "";
  v1::DataType weight_dtype = v1::DATA_TYPE_F32;
  v1::DataType x_dtype = v1::DATA_TYPE_F32;
  // Multiplies the activations.
  double x_scale = 1;
  uint64_t seed = 1;
};

// What a client has after a call.
struct VerifiedLayer {
  OwnedTensor weight;
  OwnedTensor x;
  std::optional<OwnedTensor> x_quantized;
  // Named by role.
  std::vector<OwnedTensor> result;
  v1::Certificate certificate;

  verify::Sources Sources() const;
};

// Random weights and correlated activations, quantized.
absl::StatusOr<VerifiedLayer> QuantizeRandom(const LayerOptions& options,
                                             const engine::ResolvedSpec& spec);

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_CLIENT_VERIFY_LAYERS_H_
