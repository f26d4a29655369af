#include "jobs/strand.h"

#include <functional>
#include <utility>

namespace certiq::jobs {

void Strand::Post(WorkerPool::Task task) {
  {
    const std::lock_guard lock(mu_);
    tasks_.push_back(std::move(task));
    if (tasks_.size() > 1) return;
  }
  Next();
}

void Strand::Next() {
  const std::shared_ptr<Strand> self = shared_from_this();
  for (;;) {
    WorkerPool::Task task;
    {
      const std::lock_guard lock(mu_);
      if (tasks_.empty()) return;
      // Its place stays, empty, so that nobody else starts the next.
      task = std::move(tasks_.front());
    }
    const auto done = task.done;
    task.done = [self, done](absl::Status status) {
      done(std::move(status));
      {
        const std::lock_guard lock(self->mu_);
        self->tasks_.pop_front();
      }
      self->Next();
    };
    const absl::Status posted = pool_.Post(std::move(task));
    if (posted.ok()) return;
    done(posted);
    const std::lock_guard lock(mu_);
    tasks_.pop_front();
  }
}

}  // namespace certiq::jobs
