// Packing of codes and scales into the tensors of a result.

#ifndef CERTIQ_ENGINE_EXPORT_PACKING_H_
#define CERTIQ_ENGINE_EXPORT_PACKING_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/kernels/aligned.h"
#include "engine/kernels/dtype.h"
#include "engine/run_context.h"
#include "engine/scales/qparams.h"
#include "engine/spec.h"

namespace certiq::engine {

// A tensor of the result; `role` is "weight", "scales" ... or a packed format's own name.
struct ResultTensor {
  std::string role;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  // Row-major, little-endian.
  UnsetVector<std::byte> bytes;
};

// The tensors of the spec's format; codes are row-major [R, N], and they and
// the grid are in the original order of features (K = N below, b bits, u = code, z = zero).
//   dense         "weight" F32, F16 or BF16 [R, N], the level of every code; "scales" F32 [R,
//   groups];
//                 with an asymmetric grid "zeros" I32 [R, groups]; with groups "g_idx" I32 [N].
//   GPTQ          "qweight" I32 [K b / 32, R]: for each output channel the codes along K as a
//   stream of
//                 bits, least significant first; "qzeros" I32 [groups, R b / 32]: the zero points
//                 along R, minus one in version 1; "scales" F16 [groups, R]; "g_idx" I32 [K].
//   compressed-tensors  "weight_packed" I32 [R, ceil(K b / 32)]: the same stream row by row;
//                 "weight_scale" [R, groups] of the scale type; "weight_shape" I64 [2]; asymmetric:
//                 "weight_zero_point" I32 [ceil(R b / 32), groups], packed along R; where groups
//                 follow the order of work "weight_g_idx" I32 [K].
// Zero points are unsigned, 2^(b-1) for symmetric grids.
std::vector<ResultTensor> PackResult(const ResolvedSpec& spec, const Grid& grid,
                                     const UnsetVector<uint8_t>& codes, int64_t features,
                                     Executor& executor);

// Little-endian 32-bit words of a stream of `count` values of `bits` bits, least significant bit
// first: value i takes bits [i bits, (i + 1) bits).
std::vector<uint32_t> PackBits(const std::vector<uint8_t>& values, int32_t bits);

// Bits of codes, scales and zero points for each weight.
double BitsPerWeight(const ResolvedSpec& spec, const Grid& grid, int64_t features);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_EXPORT_PACKING_H_
