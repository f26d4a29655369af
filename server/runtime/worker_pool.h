// Worker pool: the compute threads, their tasks, the queue of jobs and nested parallel loops.

#ifndef CERTIQ_RUNTIME_WORKER_POOL_H_
#define CERTIQ_RUNTIME_WORKER_POOL_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "engine/run_context.h"
#include "observability/observer.h"

namespace certiq::server {

// A worker that is free takes, in this order:
//  1. a task: short work such as folding one chunk of a stream. The pool does not bound them; a
//     stream posts at most one at a time, which does.
//  2. a job: long work from a bounded queue, by priority, then first come first served. A job's
//  slot
//     is held from admission on, so that an upload that was accepted is never refused at its end.
//  3. pieces of a ParallelFor that a task or a job is running, until work of 1 or 2 arrives. So one
//     job alone uses all workers, and as many jobs as workers have one each: running threads never
//     outnumber workers.
// The caller of ParallelFor, a worker or not, works on its own pieces too, so the loop ends even if
// no worker is free to help. A job runs tasks between its pieces, for at most as long as it
// computes itself: uploads go on while every worker has a job.
//
// No exception leaves the pool. From a task or a job, std::bad_alloc becomes RESOURCE_EXHAUSTED and
// anything else INTERNAL (base/exception_guard.h); from a piece it is rethrown to the caller of
// ParallelFor.
//
// Thread-safe. Completions run without the pool's lock and may call the pool.
class WorkerPool final : public engine::Executor {
 public:
  using JobId = uint64_t;

  // A slot of the queue of jobs, given back on destruction. Jobs of one priority start in the order
  // in which they got their slots. Movable.
  class Slot {
   public:
    Slot() = default;
    Slot(Slot&& other) noexcept
        : pool_(std::exchange(other.pool_, nullptr)),
          id_(other.id_),
          share_(std::exchange(other.share_, nullptr)),
          parked_(std::exchange(other.parked_, false)) {}
    Slot& operator=(Slot&& other) noexcept;
    ~Slot() { Release(); }
    explicit operator bool() const { return pool_ != nullptr; }
    void Release();
    // The job waits elsewhere until it is enqueued; it counts as queued from now on.
    void Park();

   private:
    friend class WorkerPool;
    Slot(WorkerPool* pool, JobId id, int* share) : pool_(pool), id_(id), share_(share) {}
    WorkerPool* pool_ = nullptr;
    JobId id_ = 0;
    // The pool's count of its holder's slots; null where they are not counted.
    int* share_ = nullptr;
    bool parked_ = false;
  };

  struct Task {
    std::function<absl::Status()> run;
    // Called once, on the same thread, with the status of `run`.
    std::function<void(absl::Status)> done;
  };
  struct Job {
    // Higher goes first.
    int priority = 0;
    // Cancelled when the job should stop; not null.
    std::shared_ptr<engine::Cancellation> cancellation;
    // Takes the resources that the job needs to start, or returns false if they are not free yet;
    // null if it needs none. Called again after Poke and whenever a job ends. While a job waits for
    // its resources, jobs behind it start only if they need none. Called with the pool's lock held,
    // so it is short and does not call the pool.
    std::function<bool()> ready = nullptr;
    std::function<absl::Status()> run;
    // Called once: with the status of `run`, on the same thread; or, if the job is cancelled while
    // it waits, with the reason, on the thread that cancels.
    std::function<void(absl::Status)> done;
  };

  // REQUIRES: workers >= 1, queue_limit >= 1.
  WorkerPool(int workers, int queue_limit, Observer& observer = IgnoreEvents());
  ~WorkerPool() override;
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  void ParallelFor(int64_t count, const std::function<void(int64_t)>& body) override
      ABSL_LOCKS_EXCLUDED(mu_);

  // Works on pieces of running ParallelFors until `done` is true. It is for a job that waits for a
  // result of another job. The thread that sets `done` calls WakeHelpers after it.
  void HelpUntil(const std::atomic<bool>& done) ABSL_LOCKS_EXCLUDED(mu_);
  void WakeHelpers() ABSL_LOCKS_EXCLUDED(mu_);

  // UNAVAILABLE after Shutdown; then `done` is not called.
  absl::Status Post(Task task) ABSL_LOCKS_EXCLUDED(mu_);

  // A slot for `holder`, of whom each may have three quarters of them, so that one alone does not
  // keep others out; "" may have all. RESOURCE_EXHAUSTED with a retry delay if all slots are held,
  // UNAVAILABLE while draining.
  absl::StatusOr<Slot> Admit(const std::string& holder = "") ABSL_LOCKS_EXCLUDED(mu_);
  // May pass the limit. It is for jobs that were admitted before a restart.
  Slot AdmitAgain() ABSL_LOCKS_EXCLUDED(mu_);

  // Queues a job; its slot is free again when the job starts. Works while draining. UNAVAILABLE
  // after Shutdown; then `done` is not called.
  absl::StatusOr<JobId> Enqueue(Slot slot, Job job) ABSL_LOCKS_EXCLUDED(mu_);

  // Tells the job to stop for `reason`. A job that waits leaves the queue at once; its completion
  // runs before this returns. Unknown and finished ids are ignored.
  void Cancel(JobId id, absl::StatusCode reason) ABSL_LOCKS_EXCLUDED(mu_);

  // Has the pool call `ready` of queued jobs again.
  void Poke() ABSL_LOCKS_EXCLUDED(mu_);

  // From now on Admit answers UNAVAILABLE.
  void StopAdmitting() ABSL_LOCKS_EXCLUDED(mu_);
  bool admitting() const ABSL_LOCKS_EXCLUDED(mu_);

  // StopAdmitting, then waits until no slot is held and no job or task is left. False if `deadline`
  // came first. Not to be called from a worker.
  bool Drain(std::chrono::steady_clock::time_point deadline) ABSL_LOCKS_EXCLUDED(mu_);

  // Waits until no job or task runs; jobs may still be queued. False if `deadline` came first. Not
  // to be called from a worker.
  bool WaitRunning(std::chrono::steady_clock::time_point deadline) ABSL_LOCKS_EXCLUDED(mu_);

  // Cancels all jobs with UNAVAILABLE, lets tasks end, joins the threads. Idempotent. Not to be
  // called from a worker.
  void Shutdown() ABSL_LOCKS_EXCLUDED(mu_, join_mu_);

  int workers() const { return workers_; }
  int queue_limit() const { return queue_limit_; }
  int64_t queue_depth() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  // A running ParallelFor, on its caller's stack. `error` and every write of `helpers` belong to
  // the pool's mu_, which annotations of another struct cannot name.
  struct Loop {
    Loop(int64_t loop_count, const std::function<void(int64_t)>& loop_body)
        : count(loop_count), body(loop_body) {}

    const int64_t count;
    const std::function<void(int64_t)>& body;
    std::atomic<int64_t> next{0};
    // Atomic, since the caller's spin wait reads it without the lock.
    std::atomic<int> helpers{0};
    std::exception_ptr error;
    // Notified when the last helper has left.
    base::ConditionVariable left;

    bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }
  };
  // Order in the queue: priority descending, then age.
  using Rank = std::pair<int, JobId>;
  struct Queued {
    JobId id;
    // See Slot.
    int* share;
    Job job;
  };

  // State of the calling thread; see worker_pool.cc.
  struct ThreadState;
  static thread_local ThreadState thread_;

  void Work() ABSL_LOCKS_EXCLUDED(mu_);
  // Runs pieces of `loop` until none is left or, if `yield`, until a task or a job waits.
  void RunPieces(Loop& loop, bool yield) ABSL_LOCKS_EXCLUDED(mu_);
  // Between two pieces of a job: runs one task if one waits and the job's share allows it.
  void ServeTask() ABSL_LOCKS_EXCLUDED(mu_);
  // Does RunPieces as one of the loop's helpers, whom its caller waits for. The mutex is released
  // meanwhile.
  void Help(Loop& loop, bool yield) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The running loop with pieces left and the fewest helpers; null if there is none.
  Loop* LoopToHelp() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Moves the first job that can start from the queue to `running_`.
  std::optional<Queued> TakeJob() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Takes the first task and runs it; the mutex is released while it runs.
  void RunTask() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Consumes `queued`: the resources that its functions hold are free before the job counts as
  // done.
  void RunJob(Queued&& queued) ABSL_LOCKS_EXCLUDED(mu_);
  // A slot that nobody holds any more.
  void GiveSlot(int* share) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SetBusy(int change) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Publishes the queue's depth.
  void QueueChanged() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const int workers_;
  const int queue_limit_;
  Observer& observer_;

  mutable base::Mutex mu_;
  base::ConditionVariable work_;     // there may be work for a waiting worker
  base::ConditionVariable idle_;     // no task or job may be left
  base::ConditionVariable helpers_;  // HelpUntil may have a loop to help, or be over
  std::deque<Task> tasks_ ABSL_GUARDED_BY(mu_);
  std::map<Rank, Queued> queue_ ABSL_GUARDED_BY(mu_);
  std::map<JobId, Rank> queued_ ABSL_GUARDED_BY(mu_);
  std::map<JobId, std::shared_ptr<engine::Cancellation>> running_ ABSL_GUARDED_BY(mu_);
  std::list<Loop*> loops_ ABSL_GUARDED_BY(mu_);
  JobId next_id_ ABSL_GUARDED_BY(mu_) = 1;
  // Slots held: by jobs that are admitted and do not run yet.
  int slots_ ABSL_GUARDED_BY(mu_) = 0;
  // By their holders; an entry that was made stays where it is.
  std::map<std::string, int> shares_ ABSL_GUARDED_BY(mu_);
  // The part of them that jobs hold which wait elsewhere.
  int parked_ ABSL_GUARDED_BY(mu_) = 0;
  // Tasks and jobs that run, their completions included.
  int active_ ABSL_GUARDED_BY(mu_) = 0;
  // Workers that wait on work_.
  int waiting_ ABSL_GUARDED_BY(mu_) = 0;
  int busy_ ABSL_GUARDED_BY(mu_) = 0;
  bool admitting_ ABSL_GUARDED_BY(mu_) = true;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  // Read between pieces without the lock: the size of tasks_; whether a job may be able to start.
  std::atomic<int64_t> tasks_waiting_{0};
  std::atomic<bool> jobs_waiting_{false};
  // Counts loops, tasks and jobs that were added, so that a worker's spin wait sees a new one.
  std::atomic<uint64_t> announced_{0};

  base::Mutex join_mu_;
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(join_mu_);
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_WORKER_POOL_H_
