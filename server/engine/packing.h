// Codes to the tensors of a result.

#ifndef CERTIQ_ENGINE_PACKING_H_
#define CERTIQ_ENGINE_PACKING_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/dtype.h"
#include "engine/grid.h"
#include "engine/spec.h"

namespace certiq::engine {

// A tensor of the result; `role` is "weight", "scales", "zeros", "g_idx" or
// a packed format's own name.
struct ResultTensor {
  std::string role;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  // Row-major, little-endian.
  std::vector<std::byte> bytes;
};

// FORMAT_DENSE_F32: "weight" F32 [R, N], the level of every code; "scales"
// F32 [R, groups]; with an asymmetric grid "zeros" I32 [R, groups]; with
// groups "g_idx" I32 [N]. `codes` is row-major [R, N].
std::vector<ResultTensor> PackDense(const ResolvedSpec& spec, const Grid& grid,
                                    const std::vector<uint8_t>& codes, int64_t features);

// Bits of codes, scales and zero points for each weight.
double BitsPerWeight(const ResolvedSpec& spec, const Grid& grid, int64_t features);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_PACKING_H_
