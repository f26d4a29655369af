// Waiting awake for a moment before going to sleep.

#ifndef CERTIQ_RUNTIME_SPIN_WAIT_H_
#define CERTIQ_RUNTIME_SPIN_WAIT_H_

#include <chrono>

namespace certiq::server {

// How long a thread looks out for the next loop, or for the last piece of its own, before it
// sleeps. The loops of a job follow one another in less, and to be woken takes as long.
inline constexpr std::chrono::microseconds kLookOut(100);

// Whether `seen` came true in that time.
template <typename Condition>
bool LookOut(const Condition& seen) {
  const auto end = std::chrono::steady_clock::now() + kLookOut;
  do {
    for (int i = 0; i < 16; ++i) {
      if (seen()) return true;
      __builtin_ia32_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_SPIN_WAIT_H_
