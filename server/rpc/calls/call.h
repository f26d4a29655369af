// A call: one machine for RPCs of every shape.

#ifndef CERTIQ_RPC_CALLS_CALL_H_
#define CERTIQ_RPC_CALLS_CALL_H_

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "engine/run_context.h"
#include "rpc/calls/call_life.h"
#include "rpc/calls/messages.h"
#include "runtime/byte_budget.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// What a drain does to a call.
enum class OnDrain {
  // The call is answered as ever.
  kIgnore,
  // It is refused, but goes on where its first message was taken before.
  kRefuse,
  // It ends in any case: its client goes on with the next server.
  kEnd,
};

// What calls of one method may cost while they last.
struct CallLimits {
  // The largest message that a client may send.
  int64_t message_bytes = int64_t{64} << 10;
  // What the server holds for the call beside what its hooks reserve: its request, and answers that
  // the client may leave unread. Taken from the tenant's memory where answers are streamed, from
  // the calls' own budget where there is one.
  int64_t held_bytes = int64_t{64} << 10;
  // How long the client may take to bring its next whole message; zero: as long as it likes once
  // the first was taken.
  std::chrono::milliseconds idle = std::chrono::seconds(60);
};

// How a call is made; see Router.
struct CallStart {
  grpc::CallbackServerContext* context = nullptr;
  const CallEnvironment& environment;
  const RpcMethod& method;
  CallLimits limits;
  Caller caller;
  // Not OK: the call ends at once.
  absl::Status refused;
  ByteBudget::Reservation held;
};

// The life of a call:
//  1. The Router makes it when its headers are there, and begins it. Nothing of a message is read
//     before its caller is known. Messages are byte buffers, parsed on the pool, so that bytes that
//     do not parse are told from a stream that ended. They are taken one at a time, in order; two
//     are held at most (one until the first was taken), and beyond that nothing is read: flow
//     control stops the client.
//  2. After the last message End runs. Of calls that stream answers, Produce makes one when the one
//     before is out and there may be something to say, so that a slow reader holds one and no more.
//     It may run beside Take and End.
//  3. Where End started work of its own (WorkStarted), the call waits for WorkEnded.
//  4. A failure (the client left, the deadline passed, a hook's error, a drain, a limit) sets the
//     status if it is still OK, tells what runs to stop and discards what waits.
//  5. Finish is called in one place, when nothing of the call is under way; what it holds is given
//     back before.
//  6. OnDone, after every other reaction: tells the watchers and deletes the call.
//
// All hooks but Drop run as tasks of the pool, whose guard turns exceptions into statuses; gRPC's
// threads only move buffers. One mutex guards the state; StartRead, StartWrite and Finish are
// called with it held (gRPC never runs a reaction inside them).
class Call : public grpc::ServerGenericBidiReactor, public LiveCall {
 public:
  Call(CallStart start, OnDrain on_drain);

  // Once, after construction: a drain may end the call as soon as it is in the registry.
  void Begin();

  void OnReadDone(bool ok) final;
  void OnWriteDone(bool ok) final;
  void OnCancel() override;
  void OnDone() override;
  void Abort(const absl::Status& reason, bool only_waiting) override;
  void Supervise(std::chrono::steady_clock::time_point now) override;

 protected:
  // What Produce found.
  enum class Produced { kMessage, kNothingYet, kEnd };

  // Takes a message.
  virtual absl::Status Take(const Bytes& message) = 0;
  // After the last message. An answer that is not streamed is made here or in Take.
  virtual absl::Status End() { return absl::OkStatus(); }
  // The next message to write. kEnd, once End has run, where there is none left.
  virtual absl::StatusOr<Produced> Produce(Bytes* /*outgoing*/) { return Produced::kEnd; }
  // How Take and End are run.
  virtual absl::Status Post(WorkerPool::Task task) {
    return env_.environment.pool.Post(std::move(task));
  }
  // With the lock: lets go of what the call holds, before the client hears its end.
  virtual void Drop() {}
  // Nothing of the call runs any more, no lock is held.
  virtual void Gone() {}

  // From Take or End: the answer of a call that has one.
  template <typename Message>
  absl::Status Respond(const Message& message) {
    absl::Status status = Serialize(message, &answer_);
    return status.ok() ? Hold(static_cast<int64_t>(answer_.Length())) : status;
  }
  // From Take: grows what the call may hold to so many bytes. RESOURCE_EXHAUSTED where they do not
  // fit.
  absl::Status Hold(int64_t bytes);
  // There may be something for Produce; any thread, without the lock.
  void Changed();
  // Ends the call; any thread, without the lock. Keeps the first failure.
  void Fail(absl::Status status);
  // From End: work goes on that ends with WorkEnded; `stop` tells it to stop, for a reason. It may
  // be called at once, and outlives the call.
  void WorkStarted(std::function<void(absl::StatusCode)> stop);
  // After this the call may be gone.
  void WorkEnded(absl::Status status);
  // Whether End has run; for Produce.
  bool ended();
  // Whether the client has no more to say; for Post, which is called with the lock.
  bool half_closed() const ABSL_NO_THREAD_SAFETY_ANALYSIS { return half_closed_; }

  const CallEnvironment& env_;
  const CallLimits limits_;
  const Caller caller_;
  const Tenant& tenant_ = caller_.tenant;
  CallLife life_;
  // Set where the call fails: work of the call looks at it.
  engine::Cancellation cancellation_;

 private:
  using Clock = std::chrono::steady_clock;

  bool streams_requests() const { return StreamsRequests(method_.shape); }
  bool streams_answers() const { return StreamsAnswers(method_.shape); }

  // Changes the state by `change`, with the lock, and does what follows from it.
  template <typename Change>
  void Enter(const Change& change) ABSL_LOCKS_EXCLUDED(mu_);
  void SetFailure(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Runs Take or End as a task.
  void RunTake(const std::function<absl::Status()>& work) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Taken(const absl::Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  void RunProduce() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Write() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Has gRPC give up what it is about to write. Until that was said the call is not finished.
  void CancelWrite() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Counts a message that was refused: the first for whatever reason a code tells, later ones where
  // they are invalid. Other reasons are counted where they arise.
  void CountRejection(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const RpcMethod method_;
  grpc::CallbackServerContext* const context_;
  const OnDrain on_drain_;

  base::Mutex mu_;
  std::deque<Bytes> waiting_ ABSL_GUARDED_BY(mu_);
  bool received_ ABSL_GUARDED_BY(mu_) = false;      // a message came
  bool started_ ABSL_GUARDED_BY(mu_) = false;       // the first message was taken
  bool reading_ ABSL_GUARDED_BY(mu_) = false;       // a StartRead is outstanding
  bool writing_ ABSL_GUARDED_BY(mu_) = false;       // a StartWrite is outstanding
  bool half_closed_ ABSL_GUARDED_BY(mu_) = false;   // the client has no more to say
  bool taking_ ABSL_GUARDED_BY(mu_) = false;        // Take or End is under way
  bool ending_ ABSL_GUARDED_BY(mu_) = false;        // it is End
  bool ended_ ABSL_GUARDED_BY(mu_) = false;         // End succeeded
  bool producing_ ABSL_GUARDED_BY(mu_) = false;     // Produce is under way
  bool produced_all_ ABSL_GUARDED_BY(mu_) = false;  // it said kEnd, or the one answer is out
  bool wanted_ ABSL_GUARDED_BY(mu_) = false;        // there may be something to produce
  bool cancelling_ ABSL_GUARDED_BY(mu_) = false;    // CancelWrite is under way
  bool finished_ ABSL_GUARDED_BY(mu_) = false;      // Finish was called
  // When the outstanding read and write were started.
  Clock::time_point reading_since_ ABSL_GUARDED_BY(mu_);
  Clock::time_point writing_since_ ABSL_GUARDED_BY(mu_);
  // What the call may hold, until its last message is out.
  ByteBudget::Reservation held_ ABSL_GUARDED_BY(mu_);
  // Set while work goes on that End started.
  std::function<void(absl::StatusCode)> stop_ ABSL_GUARDED_BY(mu_);
  absl::Status status_ ABSL_GUARDED_BY(mu_);  // the first failure
  // gRPC's while reading_; Produce's while producing_, gRPC's while writing_.
  Bytes incoming_;
  Bytes outgoing_;
  // Take's or End's: the answer of a call that has one.
  Bytes answer_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_CALL_H_
