// Element types of tensors on the wire and in files, and exact conversions.

#ifndef CERTIQ_ENGINE_KERNELS_DTYPE_H_
#define CERTIQ_ENGINE_KERNELS_DTYPE_H_

#include <cstddef>
#include <cstdint>

namespace certiq::engine {

// Little-endian. kF16 is IEEE binary16, kBF16 bfloat16. Data directories hold these numbers: a
// number is never given to another type.
enum class DType { kF64 = 0, kF32 = 1, kF16 = 2, kBF16 = 3, kI64 = 4, kI32 = 5, kU8 = 6 };

// Bytes of one element.
int64_t ItemSize(DType dtype);
// "F64", "F32", ... as safetensors spells them.
const char* Name(DType dtype);
bool IsFloating(DType dtype);

// Decodes `count` elements at `bytes` (any alignment) to float32, rounding to
// nearest even where the type is wider. Returns the index of the first element
// that is NaN, infinite, or too large for float32, or -1 if there is none; then all of
// `out` is written.
int64_t DecodeToFloat(DType dtype, const std::byte* bytes, int64_t count, float* out);

// The index that DecodeToFloat would return, without decoding.
int64_t FindNonFinite(DType dtype, const std::byte* bytes, int64_t count);

// Rounds a float32 to the nearest value of the type (ties to even) and
// returns it widened again; infinite where it does not fit. Only kF32, kF16, kBF16.
float RoundTo(DType dtype, float value);
// The bits of RoundTo(kF16 or kBF16, value).
uint16_t HalfBits(DType dtype, float value);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_KERNELS_DTYPE_H_
