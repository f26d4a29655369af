// Bounded spin wait, tried before a condition variable.

#ifndef CERTIQ_RUNTIME_SPIN_WAIT_H_
#define CERTIQ_RUNTIME_SPIN_WAIT_H_

#include <chrono>

namespace certiq::server {

// The longest spin. The loops of a job follow one another within it, and waking a thread that
// sleeps takes about as long.
inline constexpr std::chrono::microseconds kSpinWait(100);

// Polls `condition` for at most kSpinWait; true as soon as it holds.
template <typename Condition>
bool SpinWait(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kSpinWait;
  do {
    for (int i = 0; i < 16; ++i) {
      if (condition()) return true;
      __builtin_ia32_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_SPIN_WAIT_H_
