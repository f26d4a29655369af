// Surroundings of a computation: threads, cancellation, progress. The engine owns no thread.

#ifndef CERTIQ_ENGINE_RUN_CONTEXT_H_
#define CERTIQ_ENGINE_RUN_CONTEXT_H_

#include <atomic>
#include <cstdint>
#include <functional>

#include "absl/status/status.h"

namespace certiq::engine {

// Runs independent pieces of work. Thread-safe.
class Executor {
 public:
  virtual ~Executor() = default;
  // Runs body(i) for every i in [0, count), in any order and on any threads,
  // and returns when all are done. An exception from a body is thrown here
  // once the others have ended. Bodies never depend on which thread runs
  // them, so results do not depend on the number of threads.
  virtual void ParallelFor(int64_t count, const std::function<void(int64_t)>& body) = 0;
};

// Runs everything on the calling thread.
class SerialExecutor final : public Executor {
 public:
  void ParallelFor(int64_t count, const std::function<void(int64_t)>& body) override {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
};

// Asks a computation to stop. Thread-safe; the first reason stays.
class Cancellation {
 public:
  void Cancel(absl::StatusCode reason) {
    int expected = 0;
    reason_.compare_exchange_strong(expected, static_cast<int>(reason));
  }
  bool cancelled() const { return reason_.load(std::memory_order_relaxed) != 0; }
  // OK while nobody asked.
  absl::Status status() const {
    const int reason = reason_.load();
    if (reason == 0) return absl::OkStatus();
    return absl::Status(static_cast<absl::StatusCode>(reason),
                        reason == static_cast<int>(absl::StatusCode::kDeadlineExceeded)
                            ? "the deadline passed before the work was done"
                            : "cancelled before the work was done");
  }

 private:
  std::atomic<int> reason_{0};
};

enum class Phase { kReceive, kQueue, kFactor, kRound, kCertify, kReference, kPack };

// All members outlive the computation. `progress` may be called from any
// thread, one call at a time, with a fraction of the phase in [0, 1].
struct RunContext {
  Executor* executor = nullptr;
  const Cancellation* cancellation = nullptr;
  std::function<void(Phase, double)> progress;

  bool cancelled() const { return cancellation != nullptr && cancellation->cancelled(); }
  absl::Status CancellationStatus() const {
    return cancellation == nullptr ? absl::OkStatus() : cancellation->status();
  }
  void Report(Phase phase, double fraction) const {
    if (progress) progress(phase, fraction);
  }
};

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_RUN_CONTEXT_H_
