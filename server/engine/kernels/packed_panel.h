// Packed panel: kPanelRows rows of a matrix, packed once and multiplied with many strips.
// Included by .cc files of the engine only, like simd.h.

#ifndef CERTIQ_ENGINE_KERNELS_PACKED_PANEL_H_
#define CERTIQ_ENGINE_KERNELS_PACKED_PANEL_H_

#include <algorithm>
#include <cstdint>

#include "engine/kernels/aligned.h"
#include "engine/kernels/simd.h"
#include "engine/kernels/upper_triangle.h"
#include "engine/run_context.h"

namespace certiq::engine {

// A block A [kPanelRows, depth] in slices of kSlice columns k, one after another; a slice in
// groups of kMicroRows rows, each [columns of the slice][kMicroRows]: what one kernel reads is
// contiguous. A slice (64 KiB of float32, 128 KiB of float64) stays in a second-level cache while
// the strips of a tile pass; the part of a strip that it meets and the products (16 KiB each with
// AVX-512) stay in the first level meanwhile.
template <typename T>
class PackedPanel {
 public:
  static constexpr int64_t kSlice = 128;
  static constexpr int64_t kGroups = kPanelRows / kMicroRows;
  static_assert(kPanelRows % kMicroRows == 0);

  explicit PackedPanel(int64_t largest_depth)
      : values_(static_cast<size_t>(largest_depth * kPanelRows)) {}

  // Packs a block: fill(k0, columns, to) writes the slice [k0, k0 + columns), A_ik to
  // to[((i / kMicroRows) columns + k - k0) kMicroRows + i % kMicroRows], all kPanelRows rows.
  template <typename Fill>
  void Pack(int64_t depth, Executor& executor, const Fill& fill) {
    depth_ = depth;
    executor.ParallelFor((depth + kSlice - 1) / kSlice, [&](int64_t slice) {
      const int64_t k0 = slice * kSlice;
      fill(k0, std::min(kSlice, depth - k0), values_.data() + k0 * kPanelRows);
    });
  }

  int64_t depth() const { return depth_; }

  // out [kPanelRows][kStrip] += A x for strips x [depth][kStrip], `x_step` and `out_step` elements
  // apart. `upper`: the first slice is zero below its diagonal.
  void AddProducts(bool upper, int64_t strips, const T* x, int64_t x_step, T* out,
                   int64_t out_step) const {
    for (int64_t k0 = 0; k0 < depth_; k0 += kSlice) {
      const int64_t columns = std::min(kSlice, depth_ - k0);
      Prefetcher next_slice(
          values_.data() + (k0 + kSlice) * kPanelRows,
          kSlice * kPanelRows * static_cast<int64_t>(sizeof(T)) / (kGroups * strips));
      for (int64_t s = 0; s < strips; ++s) {
        Prefetcher next(s + 1 < strips ? x + (s + 1) * x_step + k0 * kStrip<T>
                                       : x + std::min(k0 + kSlice, depth_) * kStrip<T>,
                        kSlice * kStrip<T> * static_cast<int64_t>(sizeof(T)) / kGroups);
        for (int64_t g = 0; g < kGroups; ++g) {
          next.FetchPart();
          next_slice.FetchPart();
          const int64_t first = upper && k0 == 0 ? std::min(g * kMicroRows, columns) : 0;
          MultiplyIntoStrip(kMicroRows, columns - first,
                            values_.data() + k0 * kPanelRows + (g * columns + first) * kMicroRows,
                            int64_t{kMicroRows}, int64_t{1},
                            x + s * x_step + (k0 + first) * kStrip<T>,
                            out + s * out_step + g * kMicroRows * kStrip<T>);
        }
      }
    }
  }

 private:
  int64_t depth_ = 0;
  UnsetVector<T> values_;
};

// Strips of a tile: the more, the less often a slice is read; fewer where every thread is to get
// some.
inline int64_t TileStrips(int64_t strips) {
  constexpr int64_t kMost = 4;
  constexpr int64_t kWantedTiles = 8;
  return std::clamp<int64_t>(strips / kWantedTiles, 1, kMost);
}

// Runs body(first, last) over tiles of strips.
template <typename Body>
void ForTiles(int64_t strips, Executor& executor, const Body& body) {
  const int64_t tile = TileStrips(strips);
  executor.ParallelFor((strips + tile - 1) / tile,
                       [&](int64_t t) { body(t * tile, std::min(strips, (t + 1) * tile)); });
}

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_KERNELS_PACKED_PANEL_H_
