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

struct WorkerPool::ThreadState {
  // The pool whose worker this thread is.
  const WorkerPool* pool = nullptr;
  // Loops on its stack, its own and those it helps.
  int loops = 0;
  bool in_task = false;
  // Its job serves no task before this.
  std::chrono::steady_clock::time_point serve_after;
};
thread_local WorkerPool::ThreadState WorkerPool::thread_;

WorkerPool::Slot& WorkerPool::Slot::operator=(Slot&& other) noexcept {
  if (this != &other) {
    Release();
    pool_ = std::exchange(other.pool_, nullptr);
    id_ = other.id_;
    share_ = std::exchange(other.share_, nullptr);
    parked_ = std::exchange(other.parked_, false);
  }
  return *this;
}

void WorkerPool::Slot::Park() {
  if (pool_ == nullptr || parked_) return;
  parked_ = true;
  const base::MutexLock lock(pool_->mu_);
  ++pool_->parked_;
  pool_->QueueChanged();
}

void WorkerPool::Slot::Release() {
  if (pool_ == nullptr) return;
  WorkerPool* const pool = std::exchange(pool_, nullptr);
  const base::MutexLock lock(pool->mu_);
  pool->GiveSlot(std::exchange(share_, nullptr));
  if (std::exchange(parked_, false)) {
    --pool->parked_;
    pool->QueueChanged();
  }
  if (pool->Idle()) pool->idle_.NotifyAll();
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
    const base::MutexLock lock(mu_);
    position = loops_.insert(loops_.end(), &loop);
    announced_.fetch_add(1, std::memory_order_relaxed);
    helpers_.NotifyAll();
    if (count - 1 >= waiting_) {
      if (waiting_ > 0) work_.NotifyAll();
    } else {
      for (int64_t i = 1; i < count; ++i) work_.NotifyOne();
    }
  }
  RunPieces(loop, /*yield=*/false);
  {
    const base::MutexLock lock(mu_);
    loops_.erase(position);
    if (loop.helpers > 0) {
      const base::MutexUnlock unlock(mu_);
      SpinWait([&loop] { return loop.helpers.load(std::memory_order_relaxed) == 0; });
    }
    while (loop.helpers > 0) loop.left.Wait(mu_);
  }
  // Nobody but this thread has the loop any more.
  if (loop.error) std::rethrow_exception(loop.error);
}

void WorkerPool::RunPieces(Loop& loop, bool yield) {
  ++thread_.loops;
  for (;;) {
    const bool tasks = tasks_waiting_.load(std::memory_order_relaxed) > 0;
    if (yield && (tasks || jobs_waiting_.load(std::memory_order_relaxed))) break;
    if (tasks) ServeTask();
    const int64_t i = loop.next.fetch_add(1, std::memory_order_relaxed);
    if (i >= loop.count) break;
    try {
      loop.body(i);
    } catch (...) {
      // The results of further pieces would be dropped: hand out no more of them.
      loop.next.store(loop.count, std::memory_order_relaxed);
      const base::MutexLock lock(mu_);
      if (!loop.error) loop.error = std::current_exception();
    }
  }
  --thread_.loops;
}

void WorkerPool::ServeTask() {
  // Tasks run between the pieces of a job only. A task, or a piece inside another, stays short.
  if (thread_.pool != this || thread_.in_task || thread_.loops != 1) return;
  const auto start = std::chrono::steady_clock::now();
  if (start < thread_.serve_after) return;
  const base::MutexLock lock(mu_);
  // A worker that waits has been notified of the task and takes it.
  if (tasks_.empty() || waiting_ > 0) return;
  RunTask();
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
  const base::MutexLock lock(mu_);
  while (!done) {
    if (Loop* const loop = LoopToHelp(); loop != nullptr) {
      Help(*loop, /*yield=*/false);
    } else {
      helpers_.Wait(mu_);
    }
  }
}

void WorkerPool::Help(Loop& loop, bool yield) {
  ++loop.helpers;
  {
    const base::MutexUnlock unlock(mu_);
    RunPieces(loop, yield);
  }
  if (--loop.helpers == 0) loop.left.NotifyAll();
}

void WorkerPool::WakeHelpers() {
  const base::MutexLock lock(mu_);
  helpers_.NotifyAll();
}

absl::Status WorkerPool::Post(Task task) {
  const base::MutexLock lock(mu_);
  if (stopping_) return ShutDown();
  tasks_.push_back(std::move(task));
  announced_.fetch_add(1, std::memory_order_relaxed);
  tasks_waiting_.fetch_add(1, std::memory_order_relaxed);
  work_.NotifyOne();
  return absl::OkStatus();
}

absl::StatusOr<WorkerPool::Slot> WorkerPool::Admit(const std::string& holder) {
  const auto full = [](const std::string& message) {
    absl::Status status = absl::ResourceExhaustedError(message);
    base::SetRetryAfter(status, base::kRetrySoon);
    return status;
  };
  const base::MutexLock lock(mu_);
  if (!admitting_) return base::DrainingError();
  if (slots_ >= queue_limit_) {
    return full(absl::StrCat("the queue is full: all ", queue_limit_,
                             " places are taken by layers that upload or wait"));
  }
  int* share = nullptr;
  if (!holder.empty()) {
    share = &shares_[holder];
    const int limit = queue_limit_ - queue_limit_ / 4;
    if (*share >= limit) {
      return full(absl::StrCat("this tenant's layers that upload or wait take ", limit, " of the ",
                               queue_limit_,
                               " places in the queue, as many as one tenant may have"));
    }
    ++*share;
  }
  ++slots_;
  return Slot(this, next_id_++, share);
}

void WorkerPool::GiveSlot(int* share) {
  --slots_;
  if (share != nullptr) --*share;
}

WorkerPool::Slot WorkerPool::AdmitAgain() {
  const base::MutexLock lock(mu_);
  ++slots_;
  return Slot(this, next_id_++, nullptr);
}

absl::StatusOr<WorkerPool::JobId> WorkerPool::Enqueue(Slot slot, Job job) {
  const base::MutexLock lock(mu_);
  if (slot.pool_ != this) return absl::InternalError("a job without a place in the queue");
  // From here on the entry in queue_ holds the slot.
  slot.pool_ = nullptr;
  int* const share = std::exchange(slot.share_, nullptr);
  if (std::exchange(slot.parked_, false)) --parked_;
  if (stopping_) {
    GiveSlot(share);
    return ShutDown();
  }
  const JobId id = slot.id_;
  const Rank rank{-job.priority, id};
  queue_.emplace(rank, Queued{id, share, std::move(job)});
  queued_.emplace(id, rank);
  jobs_waiting_ = true;
  announced_.fetch_add(1, std::memory_order_relaxed);
  QueueChanged();
  work_.NotifyOne();
  return id;
}

void WorkerPool::Cancel(JobId id, absl::StatusCode reason) {
  Job job;
  {
    const base::MutexLock lock(mu_);
    if (const auto running = running_.find(id); running != running_.end()) {
      running->second->Cancel(reason);
      return;
    }
    const auto queued = queued_.find(id);
    if (queued == queued_.end()) return;
    auto entry = queue_.extract(queued->second);
    queued_.erase(queued);
    job = std::move(entry.mapped().job);
    GiveSlot(entry.mapped().share);
    // Counted as active until its completion has run.
    ++active_;
    // The job behind it may be able to start.
    jobs_waiting_ = true;
    work_.NotifyOne();
    QueueChanged();
  }
  job.cancellation->Cancel(reason);
  base::Complete(job.done, job.cancellation->status());
  job = Job();
  const base::MutexLock lock(mu_);
  --active_;
  if (active_ == 0) idle_.NotifyAll();
}

void WorkerPool::Poke() {
  const base::MutexLock lock(mu_);
  if (queue_.empty()) return;
  jobs_waiting_ = true;
  work_.NotifyOne();
}

void WorkerPool::StopAdmitting() {
  const base::MutexLock lock(mu_);
  admitting_ = false;
}

bool WorkerPool::admitting() const {
  const base::MutexLock lock(mu_);
  return admitting_;
}

bool WorkerPool::Drain(std::chrono::steady_clock::time_point deadline) {
  const base::MutexLock lock(mu_);
  admitting_ = false;
  while (!Idle()) {
    if (!idle_.WaitUntil(mu_, deadline)) return Idle();
  }
  return true;
}

bool WorkerPool::WaitRunning(std::chrono::steady_clock::time_point deadline) {
  const base::MutexLock lock(mu_);
  while (active_ != 0 || !tasks_.empty()) {
    if (!idle_.WaitUntil(mu_, deadline)) return active_ == 0 && tasks_.empty();
  }
  return true;
}

void WorkerPool::Shutdown() {
  std::vector<JobId> queued;
  {
    const base::MutexLock lock(mu_);
    admitting_ = false;
    stopping_ = true;
    for (const auto& [id, rank] : queued_) queued.push_back(id);
    for (const auto& [id, cancellation] : running_) {
      cancellation->Cancel(absl::StatusCode::kUnavailable);
    }
    work_.NotifyAll();
  }
  for (const JobId id : queued) Cancel(id, absl::StatusCode::kUnavailable);
  const base::MutexLock join_lock(join_mu_);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

int64_t WorkerPool::queue_depth() const {
  const base::MutexLock lock(mu_);
  return static_cast<int64_t>(queue_.size()) + parked_;
}

void WorkerPool::Work() {
  thread_.pool = this;
  const base::MutexLock lock(mu_);
  // After helping a loop the worker spins before it sleeps: the job's next loop is likely to come
  // soon.
  bool helped = false;
  for (;;) {
    if (!tasks_.empty()) {
      SetBusy(+1);
      RunTask();
      SetBusy(-1);
    } else if (std::optional<Queued> queued = TakeJob(); queued.has_value()) {
      ++active_;
      SetBusy(+1);
      {
        const base::MutexUnlock unlock(mu_);
        RunJob(*std::exchange(queued, std::nullopt));
      }
      --active_;
      SetBusy(-1);
      // Its resources may be those that another job waits for.
      jobs_waiting_ = true;
    } else if (Loop* const loop = LoopToHelp(); loop != nullptr) {
      SetBusy(+1);
      Help(*loop, /*yield=*/true);
      SetBusy(-1);
      helped = true;
    } else if (stopping_) {
      return;
    } else if (std::exchange(helped, false)) {
      const uint64_t before = announced_.load(std::memory_order_relaxed);
      const base::MutexUnlock unlock(mu_);
      SpinWait([&] { return announced_.load(std::memory_order_relaxed) != before; });
    } else {
      ++waiting_;
      work_.Wait(mu_);
      --waiting_;
    }
    if (active_ == 0) idle_.NotifyAll();
  }
}

std::optional<WorkerPool::Queued> WorkerPool::TakeJob() {
  // Shutdown cancels the jobs that wait.
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
    GiveSlot(queued.share);
    QueueChanged();
    // The job behind it may be able to start too.
    if (!queue_.empty()) work_.NotifyOne();
    return queued;
  }
  jobs_waiting_ = false;
  return std::nullopt;
}

void WorkerPool::RunTask() {
  Task task = std::move(tasks_.front());
  tasks_.pop_front();
  tasks_waiting_.fetch_sub(1, std::memory_order_relaxed);
  ++active_;
  {
    const base::MutexUnlock unlock(mu_);
    thread_.in_task = true;
    base::Complete(task.done, base::RunGuarded(task.run));
    // The resources that its functions hold are free before it counts as done.
    task = Task();
    thread_.in_task = false;
  }
  --active_;
}

void WorkerPool::RunJob(Queued&& queued) {
  const Job job = std::move(queued.job);
  absl::Status status = base::RunGuarded(job.run);
  {
    const base::MutexLock lock(mu_);
    running_.erase(queued.id);
  }
  base::Complete(job.done, std::move(status));
}

void WorkerPool::SetBusy(int change) {
  busy_ += change;
  observer_.WorkersChanged(busy_, workers_);
}

void WorkerPool::QueueChanged() {
  observer_.QueueChanged(static_cast<int64_t>(queue_.size()) + parked_, queue_limit_);
}

bool WorkerPool::Idle() const {
  return slots_ == 0 && active_ == 0 && tasks_.empty() && queue_.empty();
}

}  // namespace certiq::server
