// The inner kernel shared by statistics, factor, rounding and quadratic forms,
// for the instruction set this variant of the library is compiled for.
//
// Data that is multiplied comes in strips: kStrip<T> columns side by side,
// [depth][kStrip<T>] row-major, two vector registers wide. The kernel holds kMicroRows
// rows of results of that width in registers: with AVX-512 16 of 32 registers, with AVX2 8
// of 16. Two multiply-add units of latency 4 need 8 independent chains, so both suffice.
//
// Included by .cc files of the engine only: what it defines differs between
// the variants of the library.

#ifndef CERTIQ_ENGINE_SIMD_H_
#define CERTIQ_ENGINE_SIMD_H_

#include <cstdint>
#include <cstring>

namespace certiq::engine {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kMicroRows = 8;
inline constexpr char kIsa[] = "x86-64-v4";
#elif defined(__AVX2__) && defined(__FMA__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kMicroRows = 4;
inline constexpr char kIsa[] = "x86-64-v3";
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kMicroRows = 4;
inline constexpr char kIsa[] = "x86-64-v2";
#endif

template <typename T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <typename T>
inline constexpr int kStrip = 2 * kLanes<T>;

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = float __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  using Type = double __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename VectorOf<T>::Type;

// A block of results in registers.
template <typename T>
struct Accumulator {
  Vector<T> row[kMicroRows][2];
};

template <typename T>
inline Vector<T> LoadVector(const T* from) {
  Vector<T> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
inline void StoreVector(T* to, const Vector<T>& value) {
  std::memcpy(to, &value, sizeof(value));
}

// sum.row[r][.] += sum_k a[k * a_step + r * a_row] * b[k * kStrip + .] for r in
// [0, kMicroRows). Each result's chain runs over k in order.
template <typename T>
__attribute__((always_inline)) inline void MultiplyStrip(int64_t depth, const T* a, int64_t a_step,
                                                         int64_t a_row, const T* b,
                                                         Accumulator<T>& sum) {
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<T> b0 = LoadVector(b + k * kStrip<T>);
    const Vector<T> b1 = LoadVector(b + k * kStrip<T> + kLanes<T>);
    const T* column = a + k * a_step;
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const T scalar = column[r * a_row];
      sum.row[r][0] += scalar * b0;
      sum.row[r][1] += scalar * b1;
    }
  }
}

// out[r][.] += sum_k a[k * a_step + r * a_row] * b[k][.] for r in [0, rows);
// out is [rows][kStrip].
template <typename T>
inline void MultiplyIntoStrip(int64_t rows, int64_t depth, const T* a, int64_t a_step,
                              int64_t a_row, const T* b, T* out) {
  const int64_t whole = rows / kMicroRows * kMicroRows;
  for (int64_t r0 = 0; r0 < whole; r0 += kMicroRows) {
    Accumulator<T> sum;
    for (int r = 0; r < kMicroRows; ++r) {
      sum.row[r][0] = LoadVector(out + (r0 + r) * kStrip<T>);
      sum.row[r][1] = LoadVector(out + (r0 + r) * kStrip<T> + kLanes<T>);
    }
    MultiplyStrip(depth, a + r0 * a_row, a_step, a_row, b, sum);
    for (int r = 0; r < kMicroRows; ++r) {
      StoreVector(out + (r0 + r) * kStrip<T>, sum.row[r][0]);
      StoreVector(out + (r0 + r) * kStrip<T> + kLanes<T>, sum.row[r][1]);
    }
  }
  for (int64_t r = whole; r < rows; ++r) {
    Vector<T> low = LoadVector(out + r * kStrip<T>);
    Vector<T> high = LoadVector(out + r * kStrip<T> + kLanes<T>);
    for (int64_t k = 0; k < depth; ++k) {
      const T scalar = a[k * a_step + r * a_row];
      low += scalar * LoadVector(b + k * kStrip<T>);
      high += scalar * LoadVector(b + k * kStrip<T> + kLanes<T>);
    }
    StoreVector(out + r * kStrip<T>, low);
    StoreVector(out + r * kStrip<T> + kLanes<T>, high);
  }
}

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SIMD_H_
