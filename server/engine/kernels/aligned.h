// Aligned memory: cache lines, and large pages where it is large.

#ifndef CERTIQ_ENGINE_KERNELS_ALIGNED_H_
#define CERTIQ_ENGINE_KERNELS_ALIGNED_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace certiq::engine {

// A cache line: a 64-byte vector that crosses two costs two loads.
inline constexpr size_t kLineBytes = 64;
// A large page of x86-64. 64 MiB are 32 page faults instead of 16,384, and strides of a page and
// more (rows of a triangle) stay within what the TLB holds. From two pages on the start of
// an allocation is moved to a page; what does not fill the last page stays on small ones.
inline constexpr size_t kPageBytes = size_t{2} << 20;

// Elements start out zero where kZeroed, else with no value at all. std::bad_alloc where memory
// runs out.
template <typename T, bool kZeroed>
class AlignedAllocator {
 public:
  using value_type = T;
  template <typename U>
  struct rebind {
    using other = AlignedAllocator<U, kZeroed>;
  };

  AlignedAllocator() = default;
  template <typename U>
  // NOLINTNEXTLINE(google-explicit-constructor): allocators convert.
  AlignedAllocator(const AlignedAllocator<U, kZeroed>& /*other*/) noexcept {}

  T* allocate(size_t count) {
    if (count > std::numeric_limits<size_t>::max() / sizeof(T)) throw std::bad_alloc();
    const size_t bytes = count * sizeof(T);
    void* memory = ::operator new(bytes, Alignment(bytes));
    // Advice: a kernel that does not take it works with small pages.
    if (Large(bytes)) static_cast<void>(madvise(memory, bytes & ~(kPageBytes - 1), MADV_HUGEPAGE));
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t count) noexcept {
    ::operator delete(memory, Alignment(count * sizeof(T)));
  }

  template <typename U, typename... Args>
  void construct(U* at, Args&&... args) {
    if constexpr (sizeof...(Args) == 0 && !kZeroed) {
      static_assert(std::is_trivially_default_constructible_v<U>);
      ::new (static_cast<void*>(at)) U;
    } else {
      std::construct_at(at, std::forward<Args>(args)...);
    }
  }

  friend bool operator==(const AlignedAllocator&, const AlignedAllocator&) { return true; }

 private:
  static bool Large(size_t bytes) { return bytes >= 2 * kPageBytes; }
  static std::align_val_t Alignment(size_t bytes) {
    return std::align_val_t{Large(bytes) ? kPageBytes : kLineBytes};
  }
};

// Gives the memory of what lies in [begin, end) back before its owner goes: whole pages; what was
// in them has no value any more. Advice, like large pages.
template <typename T>
void DiscardPages(T* begin, T* end) {
  const auto address = [](T* at) { return reinterpret_cast<uintptr_t>(at); };
  const uintptr_t first = (address(begin) + kPageBytes - 1) / kPageBytes * kPageBytes;
  const uintptr_t last = address(end) / kPageBytes * kPageBytes;
  if (first >= last) return;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): rounded to a page.
  static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED));
}

template <typename T>
using AlignedVector = std::vector<T, AlignedAllocator<T, true>>;
// For memory that is written before it is read.
template <typename T>
using UnsetVector = std::vector<T, AlignedAllocator<T, false>>;

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_KERNELS_ALIGNED_H_
