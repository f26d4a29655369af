// Strand: tasks that run one at a time, in order.

#ifndef CERTIQ_RUNTIME_STRAND_H_
#define CERTIQ_RUNTIME_STRAND_H_

#include <deque>
#include <memory>

#include "absl/status/status.h"
#include "base/mutex.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// Runs its tasks on the pool, never two at once, in the order they were posted. It is what Asio
// calls a strand. Thread-safe; owned by std::shared_ptr, which a running task shares. The pool
// outlives it.
class Strand : public std::enable_shared_from_this<Strand> {
 public:
  explicit Strand(WorkerPool& pool) : pool_(pool) {}
  Strand(const Strand&) = delete;
  Strand& operator=(const Strand&) = delete;

  // UNAVAILABLE after a shutdown, and then `done` is not called. For a task that waited when the
  // shutdown came, `done` is called with UNAVAILABLE.
  absl::Status Post(WorkerPool::Task task) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  // Hands the first task to the pool.
  absl::Status Start() ABSL_LOCKS_EXCLUDED(mu_);
  // Removes the first task, which has ended, and starts the next.
  void Next() ABSL_LOCKS_EXCLUDED(mu_);

  WorkerPool& pool_;
  base::Mutex mu_;
  // The first task is the one that runs.
  std::deque<WorkerPool::Task> tasks_ ABSL_GUARDED_BY(mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_STRAND_H_
