// Mutex, scoped locks and condition variable with clang's thread-safety annotations.

#ifndef CERTIQ_BASE_MUTEX_H_
#define CERTIQ_BASE_MUTEX_H_

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "absl/base/thread_annotations.h"

// The reverse of ABSL_EXCLUSIVE_LOCK_FUNCTION in a scoped type. Abseil's ABSL_UNLOCK_FUNCTION also
// stands for shared locks, and then clang does not take them again at the end of the scope.
#if defined(__clang__)
#define CERTIQ_EXCLUSIVE_UNLOCK_FUNCTION(...) __attribute__((release_capability(__VA_ARGS__)))
#else
#define CERTIQ_EXCLUSIVE_UNLOCK_FUNCTION(...)
#endif

namespace certiq::base {

// These wrap std's types. Abseil's own Mutex stays out, since ThreadSanitizer does not see into its
// prebuilt library. A member that a mutex guards is marked ABSL_GUARDED_BY(mu_), a function that
// needs it held ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_), one that takes it ABSL_LOCKS_EXCLUDED(mu_);
// clang's -Wthread-safety checks all three.
class ABSL_LOCKABLE Mutex {
 public:
  Mutex() = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;

  void Lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() { mu_.lock(); }
  void Unlock() ABSL_UNLOCK_FUNCTION() { mu_.unlock(); }
  // Tells the analysis, which does not see into callbacks, that the caller holds the mutex.
  void AssertHeld() const ABSL_ASSERT_EXCLUSIVE_LOCK() {}

 private:
  friend class ConditionVariable;
  std::mutex mu_;
};

// Holds a mutex for a scope; may let go of it in between.
class ABSL_SCOPED_LOCKABLE MutexLock {
 public:
  explicit MutexLock(Mutex& mu) ABSL_EXCLUSIVE_LOCK_FUNCTION(mu) : mu_(mu) { mu_.Lock(); }
  ~MutexLock() ABSL_UNLOCK_FUNCTION() {
    if (held_) mu_.Unlock();
  }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

  void Unlock() ABSL_UNLOCK_FUNCTION() {
    held_ = false;
    mu_.Unlock();
  }
  void Lock() ABSL_EXCLUSIVE_LOCK_FUNCTION() {
    mu_.Lock();
    held_ = true;
  }

 private:
  Mutex& mu_;
  bool held_ = true;
};

// Lets go of a mutex that the caller holds, for a scope: for work and callbacks that must run
// without it.
class ABSL_SCOPED_LOCKABLE MutexUnlock {
 public:
  explicit MutexUnlock(Mutex& mu) CERTIQ_EXCLUSIVE_UNLOCK_FUNCTION(mu) : mu_(mu) { mu_.Unlock(); }
  ~MutexUnlock() CERTIQ_EXCLUSIVE_UNLOCK_FUNCTION() { mu_.Lock(); }
  MutexUnlock(const MutexUnlock&) = delete;
  MutexUnlock& operator=(const MutexUnlock&) = delete;

 private:
  Mutex& mu_;
};

// A wait may return without a notification, so callers wait in a loop over their condition. There
// is no wait with a predicate: the analysis would not know that the mutex is held inside it.
class ConditionVariable {
 public:
  void Wait(Mutex& mu) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    std::unique_lock lock(mu.mu_, std::adopt_lock);
    changed_.wait(lock);
    lock.release();
  }
  // False once `deadline` has passed.
  bool WaitUntil(Mutex& mu, std::chrono::steady_clock::time_point deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    std::unique_lock lock(mu.mu_, std::adopt_lock);
    const std::cv_status status = changed_.wait_until(lock, deadline);
    lock.release();
    return status == std::cv_status::no_timeout;
  }
  void NotifyOne() { changed_.notify_one(); }
  void NotifyAll() { changed_.notify_all(); }

 private:
  std::condition_variable changed_;
};

}  // namespace certiq::base

#endif  // CERTIQ_BASE_MUTEX_H_
