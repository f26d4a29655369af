// Register accumulator of a packed metric's columns.
// Included by .cc files of the engine only, like simd.h.

#ifndef CERTIQ_ENGINE_SCALES_COLUMN_ACCUMULATOR_H_
#define CERTIQ_ENGINE_SCALES_COLUMN_ACCUMULATOR_H_

#include <cstdint>
#include <cstring>

#include "engine/kernels/simd.h"
#include "engine/scales/packed_metric.h"

namespace certiq::engine {

// PackedMetric::kWidth sums in float64 of float32 rows: four registers with AVX-512, eight with
// AVX2.
class ColumnAccumulator {
 public:
  void Add(double factor, const float* row) {
    using Half = float __attribute__((vector_size(kVectorBytes / 2)));
#pragma GCC unroll 16
    for (int64_t v = 0; v < kVectors; ++v) {
      Half half;
      std::memcpy(&half, row + v * kLanes<double>, sizeof(half));
      sums_[v] += factor * __builtin_convertvector(half, Vector<double>);
    }
  }
  void Store(double* to) const {
#pragma GCC unroll 16
    for (int64_t v = 0; v < kVectors; ++v) StoreVector(to + v * kLanes<double>, sums_[v]);
  }

 private:
  static constexpr int64_t kVectors = PackedMetric::kWidth / kLanes<double>;
  Vector<double> sums_[kVectors] = {};
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_SCALES_COLUMN_ACCUMULATOR_H_
