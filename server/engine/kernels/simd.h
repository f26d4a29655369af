// SIMD micro-kernel of sums, factor, rounding and quadratic forms, for the instruction set that
// this variant of the library is compiled for.
//
// Data that is multiplied comes in strips: kStrip<T> columns side by side,
// [depth][kStrip<T>] row-major, two vector registers wide. The kernel holds kMicroRows
// rows of results of that width in registers: with AVX-512 16 of 32 registers, with AVX2 8
// of 16. Two multiply-add units of latency 4 need 8 independent chains, so both suffice.
//
// Included by .cc files of the engine only: what it defines differs between
// the variants of the library.

#ifndef CERTIQ_ENGINE_KERNELS_SIMD_H_
#define CERTIQ_ENGINE_KERNELS_SIMD_H_

#include <cstdint>
#include <cstring>
#include <utility>

#include "engine/kernels/aligned.h"

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

// Memory that is read soon, fetched into a second-level cache in parts beside work that does not
// need it yet: it comes from memory or a third level, and there faster than the first product with
// it could ask for it. Where it ends does not matter.
class Prefetcher {
 public:
  Prefetcher(const void* begin, int64_t part_bytes)
      : at_(static_cast<const char*>(begin)), part_bytes_(part_bytes) {}

  void FetchPart() {
    const char* const end = at_ + part_bytes_;
    for (; at_ < end; at_ += static_cast<int64_t>(kLineBytes)) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char* at_;
  int64_t part_bytes_;
};

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

// Accumulators from and to rows of results, [kMicroRows][kStrip], and from nothing. Unrolled, so
// that they stay in registers: left to itself GCC 12 takes each through the stack, 3 % of a product
// of depth 128.
template <typename T>
__attribute__((always_inline)) inline void ClearAccumulator(Accumulator<T>& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
    sum.row[r][0] = Vector<T>{};
    sum.row[r][1] = Vector<T>{};
  }
}

template <typename T>
__attribute__((always_inline)) inline void LoadAccumulator(const T* from, Accumulator<T>& sum) {
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
    sum.row[r][0] = LoadVector(from + r * kStrip<T>);
    sum.row[r][1] = LoadVector(from + r * kStrip<T> + kLanes<T>);
  }
}

template <typename T>
__attribute__((always_inline)) inline void StoreAccumulator(const Accumulator<T>& sum, T* to) {
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
    StoreVector(to + r * kStrip<T>, sum.row[r][0]);
    StoreVector(to + r * kStrip<T> + kLanes<T>, sum.row[r][1]);
  }
}

// Takes sums off rows of results `step` elements apart.
template <typename T>
__attribute__((always_inline)) inline void SubtractAccumulator(const Accumulator<T>& sum, T* from,
                                                               int64_t step) {
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
    T* row = from + r * step;
    StoreVector(row, LoadVector(row) - sum.row[r][0]);
    StoreVector(row + kLanes<T>, LoadVector(row + kLanes<T>) - sum.row[r][1]);
  }
}

// Swaps what lies off the diagonal of two rows' 2 x 2 blocks of kSpan lanes.
template <typename T, int kSpan, int... kLane>
inline void ExchangeLanes(Vector<T>& upper, Vector<T>& lower,
                          std::integer_sequence<int, kLane...> /*lanes*/) {
  const Vector<T> both = __builtin_shufflevector(
      upper, lower, ((kLane & kSpan) != 0 ? kLanes<T> + (kLane ^ kSpan) : kLane)...);
  lower = __builtin_shufflevector(upper, lower,
                                  ((kLane & kSpan) != 0 ? kLanes<T> + kLane : (kLane ^ kSpan))...);
  upper = both;
}

// Transposes kLanes rows of as many columns.
template <typename T, int kSpan = kLanes<T> / 2>
__attribute__((always_inline)) inline void TransposeSquare(Vector<T> (&row)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & kSpan) != 0) continue;
    ExchangeLanes<T, kSpan>(row[i], row[i | kSpan], std::make_integer_sequence<int, kLanes<T>>());
  }
  if constexpr (kSpan > 1) TransposeSquare<T, kSpan / 2>(row);
}

template <typename T, int kSpan, int... kLane>
inline Vector<T> SwapLanes(const Vector<T>& value, std::integer_sequence<int, kLane...> /*lanes*/) {
  return __builtin_shufflevector(value, value, (kLane ^ kSpan)...);
}

// The sum over all lanes, by halves.
template <typename T, int kSpan = kLanes<T> / 2>
inline T SumLanes(Vector<T> value) {
  value += SwapLanes<T, kSpan>(value, std::make_integer_sequence<int, kLanes<T>>());
  if constexpr (kSpan > 1) return SumLanes<T, kSpan / 2>(value);
  return value[0];
}

// out[r][.] += sum_k a[k * a_step + r * a_row] * b[k][.] for r in [0, rows);
// out is [rows][kStrip].
template <typename T>
inline void MultiplyIntoStrip(int64_t rows, int64_t depth, const T* a, int64_t a_step,
                              int64_t a_row, const T* b, T* out) {
  const int64_t whole = rows / kMicroRows * kMicroRows;
  for (int64_t r0 = 0; r0 < whole; r0 += kMicroRows) {
    Accumulator<T> sum;
    LoadAccumulator(out + r0 * kStrip<T>, sum);
    MultiplyStrip(depth, a + r0 * a_row, a_step, a_row, b, sum);
    StoreAccumulator(sum, out + r0 * kStrip<T>);
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

#endif  // CERTIQ_ENGINE_KERNELS_SIMD_H_
