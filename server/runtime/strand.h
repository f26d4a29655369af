// Work on one thing, a piece at a time.

#ifndef CERTIQ_RUNTIME_STRAND_H_
#define CERTIQ_RUNTIME_STRAND_H_

#include <deque>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// Runs tasks on the pool, never two at once, in the order they were posted. Thread-safe; owned by
// std::shared_ptr, so that a task that is under way keeps it. The pool outlives it.
class Strand : public std::enable_shared_from_this<Strand> {
 public:
  explicit Strand(WorkerPool& pool) : pool_(pool) {}
  Strand(const Strand&) = delete;
  Strand& operator=(const Strand&) = delete;

  // UNAVAILABLE after a shutdown, and then `done` is not called; for a task that waited when the
  // shutdown came it is, with UNAVAILABLE.
  absl::Status Post(WorkerPool::Task task);

 private:
  // Hands the first task to the pool.
  absl::Status Start();
  // The first task is over: on with the next.
  void Next();

  WorkerPool& pool_;
  std::mutex mu_;
  std::deque<WorkerPool::Task> tasks_;  // guarded by mu_; the first one runs
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_STRAND_H_
