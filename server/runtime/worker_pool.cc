#include "runtime/worker_pool.h"

#include <algorithm>
#include <exception>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "base/exception_guard.h"
#include "base/status.h"
#include "runtime/spin_wait.h"

namespace certiq::server {
namespace {

absl::Status ShutDown() { return absl::UnavailableError("the server is shutting down"); }

}  // namespace

// Of the calling thread.
struct WorkerPool::ThreadState {
  // The pool whose worker it is.
  const WorkerPool* pool = nullptr;
  // Loops it is in, its own and those it helps.
  int loops = 0;
  bool in_task = false;
  // A job does no task before this.
  std::chrono::steady_clock::time_point serve_after;
};
thread_local WorkerPool::ThreadState WorkerPool::thread_;

WorkerPool::Slot& WorkerPool::Slot::operator=(Slot&& other) noexcept {
  if (this != &other) {
    Release();
    pool_ = std::exchange(other.pool_, nullptr);
  }
  return *this;
}

void WorkerPool::Slot::Release() {
  if (pool_ == nullptr) return;
  WorkerPool* const pool = std::exchange(pool_, nullptr);
  const std::lock_guard lock(pool->mu_);
  --pool->slots_;
  if (pool->Idle()) pool->idle_.notify_all();
}

WorkerPool::WorkerPool(int workers, int queue_limit, Observer& observer)
    : workers_(std::max(workers, 1)), queue_limit_(std::max(queue_limit, 1)), observer_(observer) {
  observer_.WorkersChanged(0, workers_);
  observer_.QueueChanged(0, queue_limit_);
  threads_.reserve(static_cast<size_t>(workers_));
  for (int i = 0; i < workers_; ++i) threads_.emplace_back([this] { Work(); });
}

WorkerPool::~WorkerPool() { Shutdown(); }

void WorkerPool::ParallelFor(int64_t count, const std::function<void(int64_t)>& body) {
  if (count <= 0) return;
  if (count == 1) {
    body(0);
    return;
  }
  Loop loop(count, body);
  std::list<Loop*>::iterator position;
  {
    const std::lock_guard lock(mu_);
    position = loops_.insert(loops_.end(), &loop);
    announced_.fetch_add(1, std::memory_order_relaxed);
    helpers_.notify_all();
    if (count - 1 >= waiting_) {
      if (waiting_ > 0) work_.notify_all();
    } else {
      for (int64_t i = 1; i < count; ++i) work_.notify_one();
    }
  }
  RunPieces(loop, /*helper=*/false);
  std::unique_lock lock(mu_);
  loops_.erase(position);
  if (loop.helpers > 0) {
    lock.unlock();
    LookOut([&loop] { return loop.helpers.load(std::memory_order_relaxed) == 0; });
    lock.lock();
  }
  loop.left.wait(lock, [&loop] { return loop.helpers == 0; });
  if (loop.error) {
    const std::exception_ptr error = loop.error;
    lock.unlock();
    std::rethrow_exception(error);
  }
}

void WorkerPool::RunPieces(Loop& loop, bool helper) {
  ++thread_.loops;
  for (;;) {
    const bool tasks = tasks_waiting_.load(std::memory_order_relaxed) > 0;
    if (helper && (tasks || jobs_waiting_.load(std::memory_order_relaxed))) break;
    if (tasks) ServeTask();
    const int64_t i = loop.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= loop.count) break;
    try {
      loop.body(i);
    } catch (...) {
      // The rest would be thrown away: hand out no more of it.
      loop.next.store(loop.count, std::memory_order_relaxed);
      const std::lock_guard lock(mu_);
      if (!loop.error) loop.error = std::current_exception();
    }
  }
  --thread_.loops;
}

void WorkerPool::ServeTask() {
  // Not inside another task or piece: those are short, and stay so.
  if (thread_.pool != this || thread_.in_task || thread_.loops != 1) return;
  const auto start = std::chrono::steady_clock::now();
  if (start < thread_.serve_after) return;
  std::unique_lock lock(mu_);
  // A worker with nothing else to do has been woken for it.
  if (tasks_.empty() || waiting_ > 0) return;
  RunTask(lock);
  const auto end = std::chrono::steady_clock::now();
  thread_.serve_after = end + (end - start);
}

WorkerPool::Loop* WorkerPool::LoopToHelp() {
  Loop* best = nullptr;
  for (Loop* loop : loops_) {
    if (!loop->exhausted() && (best == nullptr || loop->helpers < best->helpers)) best = loop;
  }
  return best;
}

void WorkerPool::HelpUntil(const std::atomic<bool>& done) {
  std::unique_lock lock(mu_);
  while (!done) {
    if (Loop* const loop = LoopToHelp(); loop != nullptr) {
      ++loop->helpers;
      lock.unlock();
      RunPieces(*loop, /*helper=*/false);
      lock.lock();
      if (--loop->helpers == 0) loop->left.notify_all();
    } else {
      helpers_.wait(lock);
    }
  }
}

void WorkerPool::WakeHelpers() {
  const std::lock_guard lock(mu_);
  helpers_.notify_all();
}

absl::Status WorkerPool::Post(Task task) {
  const std::lock_guard lock(mu_);
  if (stopping_) return ShutDown();
  tasks_.push_back(std::move(task));
  announced_.fetch_add(1, std::memory_order_relaxed);
  tasks_waiting_.fetch_add(1, std::memory_order_relaxed);
  work_.notify_one();
  return absl::OkStatus();
}

absl::StatusOr<WorkerPool::Slot> WorkerPool::Admit() {
  const std::lock_guard lock(mu_);
  if (!admitting_) {
    absl::Status status = absl::UnavailableError("the server is draining and takes no new work");
    base::SetRetryAfter(status, base::kRetrySoon);
    return status;
  }
  if (slots_ >= queue_limit_) {
    absl::Status status = absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: all ", queue_limit_,
                     " places are taken by layers that upload or wait"));
    base::SetRetryAfter(status, base::kRetrySoon);
    return status;
  }
  ++slots_;
  return Slot(this);
}

WorkerPool::Slot WorkerPool::AdmitAgain() {
  const std::lock_guard lock(mu_);
  ++slots_;
  return Slot(this);
}

absl::StatusOr<WorkerPool::JobId> WorkerPool::Enqueue(Slot slot, Job job) {
  const std::lock_guard lock(mu_);
  if (slot.pool_ != this) return absl::InternalError("a job without a place in the queue");
  // From here on the entry in queue_ holds the place.
  slot.pool_ = nullptr;
  if (stopping_) {
    --slots_;
    return ShutDown();
  }
  const JobId id = next_id_++;
  const Rank rank{-job.priority, id};
  queue_.emplace(rank, Queued{id, std::move(job)});
  queued_.emplace(id, rank);
  jobs_waiting_ = true;
  announced_.fetch_add(1, std::memory_order_relaxed);
  QueueChanged();
  work_.notify_one();
  return id;
}

void WorkerPool::Cancel(JobId id, absl::StatusCode reason) {
  Job job;
  {
    const std::lock_guard lock(mu_);
    if (const auto running = running_.find(id); running != running_.end()) {
      running->second->Cancel(reason);
      return;
    }
    const auto queued = queued_.find(id);
    if (queued == queued_.end()) return;
    auto entry = queue_.extract(queued->second);
    queued_.erase(queued);
    job = std::move(entry.mapped().job);
    --slots_;
    ++active_;  // until its completion has run
    // The one behind it may be able to start.
    jobs_waiting_ = true;
    work_.notify_one();
    QueueChanged();
  }
  job.cancellation->Cancel(reason);
  base::Complete(job.done, job.cancellation->status());
  job = Job();
  const std::lock_guard lock(mu_);
  --active_;
  if (active_ == 0) idle_.notify_all();
}

int64_t WorkerPool::Position(JobId id) const {
  const std::lock_guard lock(mu_);
  const auto queued = queued_.find(id);
  if (queued == queued_.end()) return -1;
  return std::distance(queue_.begin(), queue_.find(queued->second));
}

void WorkerPool::Poke() {
  const std::lock_guard lock(mu_);
  if (queue_.empty()) return;
  jobs_waiting_ = true;
  work_.notify_one();
}

void WorkerPool::StopAdmitting() {
  const std::lock_guard lock(mu_);
  admitting_ = false;
}

bool WorkerPool::admitting() const {
  const std::lock_guard lock(mu_);
  return admitting_;
}

bool WorkerPool::Drain(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(mu_);
  admitting_ = false;
  return idle_.wait_until(lock, deadline, [this] { return Idle(); });
}

bool WorkerPool::WaitRunning(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock lock(mu_);
  return idle_.wait_until(lock, deadline, [this] { return active_ == 0 && tasks_.empty(); });
}

void WorkerPool::Shutdown() {
  std::vector<JobId> queued;
  {
    const std::lock_guard lock(mu_);
    admitting_ = false;
    stopping_ = true;
    for (const auto& [id, rank] : queued_) queued.push_back(id);
    for (const auto& [id, cancellation] : running_) {
      cancellation->Cancel(absl::StatusCode::kUnavailable);
    }
    work_.notify_all();
  }
  for (const JobId id : queued) Cancel(id, absl::StatusCode::kUnavailable);
  const std::lock_guard join_lock(join_mu_);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

int64_t WorkerPool::queue_depth() const {
  const std::lock_guard lock(mu_);
  return static_cast<int64_t>(queue_.size());
}

void WorkerPool::Work() {
  thread_.pool = this;
  std::unique_lock lock(mu_);
  // It has just helped: the loop that follows is likely to come soon.
  bool helped = false;
  for (;;) {
    if (!tasks_.empty()) {
      SetBusy(+1);
      RunTask(lock);
      SetBusy(-1);
    } else if (std::optional<Queued> queued = TakeJob(); queued.has_value()) {
      ++active_;
      SetBusy(+1);
      lock.unlock();
      RunJob(*std::exchange(queued, std::nullopt));
      lock.lock();
      --active_;
      SetBusy(-1);
      // What it held may be what another waits for.
      jobs_waiting_ = true;
    } else if (Loop* const loop = LoopToHelp(); loop != nullptr) {
      ++loop->helpers;
      SetBusy(+1);
      lock.unlock();
      RunPieces(*loop, /*helper=*/true);
      lock.lock();
      SetBusy(-1);
      if (--loop->helpers == 0) loop->left.notify_all();
      helped = true;
    } else if (stopping_) {
      return;
    } else if (std::exchange(helped, false)) {
      const uint64_t before = announced_.load(std::memory_order_relaxed);
      lock.unlock();
      LookOut([&] { return announced_.load(std::memory_order_relaxed) != before; });
      lock.lock();
    } else {
      ++waiting_;
      work_.wait(lock);
      --waiting_;
    }
    if (active_ == 0) idle_.notify_all();
  }
}

std::optional<WorkerPool::Queued> WorkerPool::TakeJob() {
  // Shutdown cancels what waits.
  if (stopping_) return std::nullopt;
  bool gated = false;
  for (auto at = queue_.begin(); at != queue_.end(); ++at) {
    const Job& job = at->second.job;
    if (job.ready && (gated || !job.ready())) {
      gated = true;
      continue;
    }
    Queued queued = std::move(at->second);
    queue_.erase(at);
    queued_.erase(queued.id);
    running_.emplace(queued.id, queued.job.cancellation);
    --slots_;
    QueueChanged();
    // The next one may be able to start too.
    if (!queue_.empty()) work_.notify_one();
    return queued;
  }
  jobs_waiting_ = false;
  return std::nullopt;
}

void WorkerPool::RunTask(std::unique_lock<std::mutex>& lock) {
  Task task = std::move(tasks_.front());
  tasks_.pop_front();
  tasks_waiting_.fetch_sub(1, std::memory_order_relaxed);
  ++active_;
  lock.unlock();
  thread_.in_task = true;
  base::Complete(task.done, base::RunGuarded(task.run));
  // What it holds goes before it counts as done.
  task = Task();
  thread_.in_task = false;
  lock.lock();
  --active_;
}

void WorkerPool::RunJob(Queued&& queued) {
  const Job job = std::move(queued.job);
  absl::Status status = base::RunGuarded(job.run);
  {
    const std::lock_guard lock(mu_);
    running_.erase(queued.id);
  }
  base::Complete(job.done, std::move(status));
}

void WorkerPool::SetBusy(int change) {
  busy_ += change;
  observer_.WorkersChanged(busy_, workers_);
}

void WorkerPool::QueueChanged() {
  observer_.QueueChanged(static_cast<int64_t>(queue_.size()), queue_limit_);
}

bool WorkerPool::Idle() const {
  return slots_ == 0 && active_ == 0 && tasks_.empty() && queue_.empty();
}

}  // namespace certiq::server
