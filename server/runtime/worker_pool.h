// The threads of this server: one pool for every kind of work.

#ifndef CERTIQ_RUNTIME_WORKER_POOL_H_
#define CERTIQ_RUNTIME_WORKER_POOL_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/run_context.h"
#include "observability/observer.h"

namespace certiq::server {

// A worker that is free takes, in this order:
//  1. a task: short work such as folding one chunk of a stream. Unbounded
//     here; a stream has at most one at a time, which bounds them.
//  2. a job: long work from a bounded queue, by priority, then first come
//     first served. A job's place is held from admission on, so that an upload that
//     was accepted is never refused at its end.
//  3. pieces of a ParallelFor that a task or a job is running, until
//     something of 1 or 2 turns up. So one job alone has all the
//     workers and as many jobs as workers have one each: threads never outnumber workers.
// Who calls ParallelFor works on it too, so it ends even if no worker is free
// to help, called from a worker or not. A job does tasks between its pieces, for at most
// as long as it works itself: uploads go on while every worker has a job.
//
// Nothing that work throws leaves the pool: from a task or a job std::bad_alloc becomes
// RESOURCE_EXHAUSTED and anything else INTERNAL; from a piece it is rethrown
// to the caller of ParallelFor.
//
// Thread-safe. Completions run without the pool's lock and may call the pool.
class WorkerPool final : public engine::Executor {
 public:
  using JobId = uint64_t;

  // A place in the queue of jobs, given back on destruction. Movable.
  class Slot {
   public:
    Slot() = default;
    Slot(Slot&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)) {}
    Slot& operator=(Slot&& other) noexcept;
    ~Slot() { Release(); }
    void Release();

   private:
    friend class WorkerPool;
    explicit Slot(WorkerPool* pool) : pool_(pool) {}
    WorkerPool* pool_ = nullptr;
  };

  struct Task {
    std::function<absl::Status()> run;
    // Called once with what `run` returned, on the same thread.
    std::function<void(absl::Status)> done;
  };
  struct Job {
    // Higher goes first.
    int priority = 0;
    // Told when the job should stop; not null.
    std::shared_ptr<engine::Cancellation> cancellation;
    // Takes what the job needs to start, or says that it is not there yet; null: nothing is needed.
    // Asked again after Poke and whenever a job ends. A job that is not ready lets jobs pass that
    // need nothing, not others. Called with the pool's lock held: short, no calls of the pool.
    std::function<bool()> ready = nullptr;
    std::function<absl::Status()> run;
    // Called once: with what `run` returned, on the same thread; or, if the job
    // is cancelled while it waits, with the reason, on the thread that cancels.
    std::function<void(absl::Status)> done;
  };

  // REQUIRES: workers >= 1, queue_limit >= 1.
  WorkerPool(int workers, int queue_limit, Observer& observer = IgnoreEvents());
  ~WorkerPool() override;
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  void ParallelFor(int64_t count, const std::function<void(int64_t)>& body) override;

  // Waits for `done`, which somebody sets who calls WakeHelpers after it, and works on pieces of
  // running ParallelFors meanwhile. For a worker with a job that needs what another job makes.
  void HelpUntil(const std::atomic<bool>& done);
  void WakeHelpers();

  // UNAVAILABLE after Shutdown; then `done` is not called.
  absl::Status Post(Task task);

  // A place in the queue. RESOURCE_EXHAUSTED with a retry delay if there is
  // none, UNAVAILABLE while draining.
  absl::StatusOr<Slot> Admit();
  // A place beyond the limit, for what was admitted before a restart.
  Slot AdmitAgain();

  // Queues a job in a place that Admit gave; the place is free again when the
  // job starts. Works while draining. UNAVAILABLE after Shutdown; then `done` is not called.
  absl::StatusOr<JobId> Enqueue(Slot slot, Job job);

  // Tells the job to stop for `reason`. One that waits leaves the queue at
  // once; its completion runs before this returns. Unknown and finished ids are ignored.
  void Cancel(JobId id, absl::StatusCode reason);

  // Jobs that would start before this one, those that run not counted; -1 where it does not wait.
  int64_t Position(JobId id) const;

  // Asks jobs that were not ready again.
  void Poke();

  // From now on Admit answers UNAVAILABLE.
  void StopAdmitting();
  bool admitting() const;

  // StopAdmitting, then waits until no place is held and no job or task is left. False if
  // `deadline` came first. Not to be called from a worker.
  bool Drain(std::chrono::steady_clock::time_point deadline);

  // Waits until nothing runs, whatever waits in the queue. False if `deadline` came first. Not to
  // be called from a worker.
  bool WaitRunning(std::chrono::steady_clock::time_point deadline);

  // Cancels all jobs with UNAVAILABLE, lets tasks end, joins the threads. Idempotent. Not to be
  // called from a worker.
  void Shutdown();

  int workers() const { return workers_; }
  int queue_limit() const { return queue_limit_; }
  int64_t queue_depth() const;

 private:
  // A ParallelFor that runs; lives on its caller's stack.
  struct Loop {
    Loop(int64_t loop_count, const std::function<void(int64_t)>& loop_body)
        : count(loop_count), body(loop_body) {}

    const int64_t count;
    const std::function<void(int64_t)>& body;
    std::atomic<int64_t> next{0};
    // Changed with the pool's mutex held.
    std::atomic<int> helpers{0};
    // Guarded by the pool's mutex.
    std::exception_ptr error;
    std::condition_variable left;

    bool exhausted() const { return next.load(std::memory_order_relaxed) >= count; }
  };
  // Order in the queue: priority descending, then age.
  using Rank = std::pair<int, JobId>;
  struct Queued {
    JobId id;
    Job job;
  };

  // What a thread is doing; see worker_pool.cc.
  struct ThreadState;
  static thread_local ThreadState thread_;

  void Work();
  // Pieces of `loop` until none is left, or, for a helper, until work of
  // higher rank waits.
  void RunPieces(Loop& loop, bool helper);
  // Runs a task on a thread that has a job, if there is one to run and it is its turn.
  void ServeTask();
  // The running loop with pieces left and the fewest helpers; null if none. Needs mu_.
  Loop* LoopToHelp();
  // Moves the first job that can start from the queue to `running_`. Needs mu_.
  std::optional<Queued> TakeJob();
  void SetBusy(int change);  // needs mu_
  // Publishes what changed in the queue. Needs mu_.
  void QueueChanged();
  bool Idle() const;  // needs mu_
  // Takes the first task and runs it. `lock` is held before and after.
  void RunTask(std::unique_lock<std::mutex>& lock);
  // Consumes `queued`: what it holds goes before the job counts as done.
  void RunJob(Queued&& queued);

  const int workers_;
  const int queue_limit_;
  Observer& observer_;

  mutable std::mutex mu_;
  std::condition_variable work_;     // something to do for a waiting worker
  std::condition_variable idle_;     // nothing left to do
  std::condition_variable helpers_;  // something for HelpUntil
  // All guarded by mu_.
  std::deque<Task> tasks_;
  std::map<Rank, Queued> queue_;
  std::map<JobId, Rank> queued_;
  std::map<JobId, std::shared_ptr<engine::Cancellation>> running_;
  std::list<Loop*> loops_;
  JobId next_id_ = 1;
  int slots_ = 0;    // places held: admitted and not yet running
  int active_ = 0;   // tasks and jobs being run, their completions included
  int waiting_ = 0;  // workers with nothing to do
  int busy_ = 0;
  bool admitting_ = true;
  bool stopping_ = false;

  // Read between pieces without the lock: the size of tasks_; whether a job may be able to start.
  std::atomic<int64_t> tasks_waiting_{0};
  std::atomic<bool> jobs_waiting_{false};
  // Counts what a worker that looks out is to see: loops, tasks, jobs.
  std::atomic<uint64_t> announced_{0};

  std::mutex join_mu_;
  std::vector<std::thread> threads_;  // guarded by join_mu_ after construction
};

}  // namespace certiq::server

#endif  // CERTIQ_RUNTIME_WORKER_POOL_H_
