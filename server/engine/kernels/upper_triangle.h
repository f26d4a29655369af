// Packed upper triangle of a square matrix: a stack of block rows ("panels"), half the memory of
// the square.

#ifndef CERTIQ_ENGINE_KERNELS_UPPER_TRIANGLE_H_
#define CERTIQ_ENGINE_KERNELS_UPPER_TRIANGLE_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "engine/kernels/aligned.h"

namespace certiq::engine {

// Rows of a panel. 128 columns of float64 rows are a tile of 128 KiB: a tile
// of sums and two tiles of staged float32 rows (96 KiB each) together stay in a 512 KiB
// second-level cache.
inline constexpr int64_t kPanelRows = 128;

// Panel p holds rows [begin(p), end(p)) and columns [begin(p), size()) as a
// dense row-major matrix with row stride stride(p). What lies below the
// diagonal inside a panel's first square is unspecified and never read.
// Not thread-safe; different elements may be written from different threads.
template <typename T>
class UpperTriangle {
 public:
  UpperTriangle() = default;
  // All zero.
  explicit UpperTriangle(int64_t size) : UpperTriangle(Unset(size)) {
    std::fill(values_.begin(), values_.end(), T{0});
  }

  // Elements have no value yet.
  static UpperTriangle Unset(int64_t size) { return UpperTriangle(size, Tag()); }

  // Elements stored for a matrix of this size.
  static int64_t ElementsFor(int64_t size) {
    int64_t elements = 0;
    for (int64_t begin = 0; begin < size; begin += kPanelRows) {
      elements += std::min(kPanelRows, size - begin) * (size - begin);
    }
    return elements;
  }

  int64_t size() const { return size_; }
  int64_t panels() const { return (size_ + kPanelRows - 1) / kPanelRows; }
  int64_t begin(int64_t p) const { return p * kPanelRows; }
  int64_t end(int64_t p) const { return std::min(size_, (p + 1) * kPanelRows); }
  int64_t rows(int64_t p) const { return end(p) - begin(p); }
  int64_t stride(int64_t p) const { return size_ - begin(p); }

  // Elements before panel p.
  int64_t offset(int64_t p) const { return offsets_[static_cast<size_t>(p)]; }

  T* panel(int64_t p) { return values_.data() + offset(p); }
  const T* panel(int64_t p) const { return values_.data() + offset(p); }

  // Gives the memory of panels [0, p) back; their elements have no value any more.
  void DiscardBefore(int64_t p) { DiscardPages(panel(0), panel(0) + offset(p)); }

  // Row i from column i on: size() - i elements.
  T* row(int64_t i) { return &at(i, i); }
  const T* row(int64_t i) const { return &at(i, i); }

  // REQUIRES: begin(i's panel) <= j < size().
  T& at(int64_t i, int64_t j) {
    const int64_t p = i / kPanelRows;
    return panel(p)[(i - begin(p)) * stride(p) + (j - begin(p))];
  }
  const T& at(int64_t i, int64_t j) const { return const_cast<UpperTriangle*>(this)->at(i, j); }

 private:
  struct Tag {};
  UpperTriangle(int64_t size, Tag /*unset*/) : size_(size) {
    offsets_.reserve(static_cast<size_t>(panels()) + 1);
    int64_t offset = 0;
    for (int64_t p = 0; p < panels(); ++p) {
      offsets_.push_back(offset);
      offset += rows(p) * stride(p);
    }
    offsets_.push_back(offset);
    values_.resize(static_cast<size_t>(offset));
  }

  int64_t size_ = 0;
  std::vector<int64_t> offsets_;
  UnsetVector<T> values_;
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_KERNELS_UPPER_TRIANGLE_H_
