#include "runtime/strand.h"

#include <functional>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "base/exception_guard.h"

namespace certiq::server {

absl::Status Strand::Post(WorkerPool::Task task) {
  {
    const base::MutexLock lock(mu_);
    tasks_.push_back(std::move(task));
    if (tasks_.size() > 1) return absl::OkStatus();
  }
  absl::Status started = base::RunGuarded([this] { return Start(); });
  if (!started.ok()) Next();
  return started;
}

absl::Status Strand::Start() {
  const std::shared_ptr<Strand> self = shared_from_this();
  const base::MutexLock lock(mu_);
  WorkerPool::Task& first = tasks_.front();
  // It stays at the front, so that no other thread starts the next.
  return pool_.Post({.run = first.run, .done = [self, done = first.done](absl::Status status) {
                       // Runs also if `done` throws.
                       const absl::Cleanup next = [&self] { self->Next(); };
                       done(std::move(status));
                     }});
}

void Strand::Next() {
  WorkerPool::Task over;
  for (;;) {
    {
      const base::MutexLock lock(mu_);
      over = std::move(tasks_.front());
      tasks_.pop_front();
      if (tasks_.empty()) return;
    }
    const absl::Status started = base::RunGuarded([this] { return Start(); });
    if (started.ok()) return;
    std::function<void(absl::Status)> done;
    {
      const base::MutexLock lock(mu_);
      done = tasks_.front().done;
    }
    done(started);
  }
}

}  // namespace certiq::server
