// A call: one machine for the four shapes of RPCs.

#ifndef CERTIQ_RPC_CALLS_CALL_H_
#define CERTIQ_RPC_CALLS_CALL_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/exception_guard.h"
#include "base/mutex.h"
#include "base/status.h"
#include "engine/run_context.h"
#include "rpc/calls/call_life.h"
#include "rpc/calls/grpc_status.h"
#include "rpc/calls/messages.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// What gRPC wants of a method: messages are byte buffers, so that they are parsed on the pool and
// bytes that do not parse are told from a stream that ended.
using UnaryReactor = grpc::ServerUnaryReactor;
using ClientStreamReactor = grpc::ServerReadReactor<Bytes>;
using ServerStreamReactor = grpc::ServerWriteReactor<Bytes>;
using BidiReactor = grpc::ServerBidiReactor<Bytes, Bytes>;

// How a call is made; see StartCall.
struct CallStart {
  grpc::CallbackServerContext* context = nullptr;
  const CallEnvironment& environment;
  const RpcMethod& method;
  Tenant tenant;
  // Not OK: the call ends at once.
  absl::Status refused;
  // The message of a call that has one; null of one that streams them.
  const Bytes* request = nullptr;
  // Where the answer of a call goes that has one; null of one that streams them.
  Bytes* response = nullptr;
};

// What a drain does to a call.
enum class OnDrain {
  // The call is answered as ever.
  kIgnore,
  // It is refused, but goes on where its first message was taken before.
  kRefuse,
  // It ends in any case: its client goes on with the next server.
  kEnd,
};

// Hands gRPC's reactions, which differ between the shapes, to a call.
template <typename Reactor>
class CallReactor : public Reactor {
 protected:
  virtual void ReadDone(bool ok) = 0;
  virtual void WriteDone(bool ok) = 0;
};
template <>
class CallReactor<ClientStreamReactor> : public ClientStreamReactor {
 public:
  void OnReadDone(bool ok) final { ReadDone(ok); }

 protected:
  virtual void ReadDone(bool ok) = 0;
  virtual void WriteDone(bool ok) = 0;
};
template <>
class CallReactor<ServerStreamReactor> : public ServerStreamReactor {
 public:
  void OnWriteDone(bool ok) final { WriteDone(ok); }

 protected:
  virtual void ReadDone(bool ok) = 0;
  virtual void WriteDone(bool ok) = 0;
};
template <>
class CallReactor<BidiReactor> : public BidiReactor {
 public:
  void OnReadDone(bool ok) final { ReadDone(ok); }
  void OnWriteDone(bool ok) final { WriteDone(ok); }

 protected:
  virtual void ReadDone(bool ok) = 0;
  virtual void WriteDone(bool ok) = 0;
};

// The life of a call:
//  1. StartCall makes it and begins it. Messages are taken one at a time, in order; two are held at
//     most (one until the first was taken), and beyond that nothing is read: flow control stops the
//     client.
//  2. After the last message End runs. Of calls that stream answers, Produce makes one when the one
//     before is out and there may be something to say, so that a slow reader holds one and no more.
//     It may run beside Take and End.
//  3. Where End started work of its own (WorkStarted), the call waits for WorkEnded.
//  4. A failure (the client left, the deadline passed, a hook's error, a drain) sets the status if
//     it is still OK, tells what runs to stop and discards what waits.
//  5. Finish is called in one place, when nothing of the call is under way; what it holds is given
//     back before.
//  6. OnDone, after every other reaction: tells the watchers and deletes the call.
//
// All hooks but Drop run as tasks of the pool, whose guard turns exceptions into statuses; gRPC's
// threads only move buffers. One mutex guards the state; StartRead, StartWrite and Finish are
// called with it held (gRPC never runs a reaction inside them).
template <typename Reactor>
class Call : public CallReactor<Reactor>, public LiveCall {
 public:
  // Whether messages are streamed in, and out.
  static constexpr bool kReads =
      std::is_same_v<Reactor, ClientStreamReactor> || std::is_same_v<Reactor, BidiReactor>;
  static constexpr bool kWrites =
      std::is_same_v<Reactor, ServerStreamReactor> || std::is_same_v<Reactor, BidiReactor>;

  explicit Call(const CallStart& start, OnDrain on_drain)
      : env_(start.environment),
        tenant_(start.tenant),
        life_(this, start.method, start.environment, start.tenant.name),
        context_(start.context),
        response_(start.response),
        on_drain_(on_drain) {
    if (start.request != nullptr) {
      life_.Received(static_cast<int64_t>(start.request->Length()));
      waiting_.push_back(*start.request);
      half_closed_ = true;
    }
    status_ = start.refused;
  }

  // Once, after construction: a drain may end the call as soon as it is in the registry.
  void Begin() {
    // First in the registry, then a look at the pool: a drain that begins between the two finds
    // this call in the registry.
    life_.Begin();
    Enter([this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      if (status_.ok() && on_drain_ != OnDrain::kIgnore && !env_.environment.pool.admitting()) {
        env_.environment.observer.Rejected(Rejection::kDraining);
        SetFailure(base::DrainingError());
      }
    });
  }

  void OnCancel() override { Fail(life_.CancelReason(*context_)); }

  void Abort(const absl::Status& reason, bool only_waiting) override {
    {
      const base::MutexLock lock(mu_);
      // gRPC has the status already; what the log says is what the client hears.
      if (finished_) return;
      if (only_waiting) {
        if (on_drain_ == OnDrain::kIgnore || (on_drain_ == OnDrain::kRefuse && started_)) return;
      }
    }
    Fail(reason);
  }

  void OnDone() override {
    absl::Status status;
    {
      // Whoever called Finish may still be about to unlock.
      const base::MutexLock lock(mu_);
      status = status_;
    }
    Gone();
    life_.Over(std::move(status));
    // What the call holds may be the backend's, which goes when no call is left.
    CallRegistry& registry = env_.registry;
    delete this;
    registry.Deleted();
  }

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
    return Serialize(message, response_);
  }
  // There may be something for Produce; any thread, without the lock.
  void Changed() {
    Enter([this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { wanted_ = true; });
  }
  // Ends the call; any thread, without the lock. Keeps the first failure.
  void Fail(absl::Status status) {
    Enter([this, &status]() ABSL_NO_THREAD_SAFETY_ANALYSIS { SetFailure(std::move(status)); });
  }
  // From End: work goes on that ends with WorkEnded; `stop` tells it to stop, for a reason. It may
  // be called at once, and outlives the call.
  void WorkStarted(std::function<void(absl::StatusCode)> stop) {
    Enter([this, &stop]() ABSL_NO_THREAD_SAFETY_ANALYSIS { stop_ = std::move(stop); });
  }
  // After this the call may be gone.
  void WorkEnded(absl::Status status) {
    Enter([this, &status]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      stop_ = nullptr;
      wanted_ = true;
      SetFailure(std::move(status));
    });
  }
  // Whether End has run; for Produce.
  bool ended() {
    const base::MutexLock lock(mu_);
    return ended_;
  }
  // Whether the client has no more to say; for Post, which is called with the lock.
  bool half_closed() const ABSL_NO_THREAD_SAFETY_ANALYSIS { return half_closed_; }

  const CallEnvironment& env_;
  const Tenant tenant_;
  CallLife life_;
  // Set where the call fails: work of the call looks at it.
  engine::Cancellation cancellation_;

 private:
  static constexpr size_t kHeld = 2;

  void ReadDone(bool ok) final {
    // A call that ends early ends its reads too; that is no half-close.
    if (!ok && context_->IsCancelled()) OnCancel();
    Enter([this, ok]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      reading_ = false;
      if (!ok) {
        half_closed_ = true;
        return;
      }
      life_.Received(static_cast<int64_t>(incoming_.Length()));
      Bytes message;
      message.Swap(&incoming_);
      if (status_.ok()) waiting_.push_back(std::move(message));
    });
  }

  void WriteDone(bool ok) final {
    // Writes fail only where the call is over; without this the rest would be thrown after it.
    if (!ok) OnCancel();
    Enter([this, ok]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      writing_ = false;
      if (ok) life_.Sent(static_cast<int64_t>(outgoing_.Length()));
      outgoing_.Clear();
      wanted_ = true;
    });
  }

  // Changes the state by `change`, with the lock, and does what follows from it.
  template <typename Change>
  void Enter(const Change& change) {
    std::function<void(absl::StatusCode)> stop;
    absl::StatusCode reason = absl::StatusCode::kOk;
    {
      const base::MutexLock lock(mu_);
      const absl::Status guarded = base::RunGuarded([&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
        change();
        Advance();
        return absl::OkStatus();
      });
      if (!guarded.ok()) {
        SetFailure(guarded);
        static_cast<void>(base::RunGuarded([this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
          Advance();
          return absl::OkStatus();
        }));
      }
      if (!status_.ok() && stop_) {
        stop = stop_;
        reason = status_.code();
      }
    }
    // Without the lock, and without the call, which may be gone: a queued run ends inside.
    if (stop) stop(reason);
  }

  void SetFailure(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (status.ok() || !status_.ok()) return;
    status_ = std::move(status);
    cancellation_.Cancel(status_.code());
  }

  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (finished_) return;
    if (status_.ok() && !taking_ && !ended_) {
      if (!waiting_.empty()) {
        const auto message = std::make_shared<Bytes>(std::move(waiting_.front()));
        waiting_.pop_front();
        RunTake([this, message] { return Take(*message); });
      } else if (half_closed_) {
        ending_ = true;
        RunTake([this] { return End(); });
      }
    }
    if constexpr (kReads) {
      const size_t held = waiting_.size() + (taking_ ? 1 : 0);
      if (status_.ok() && !reading_ && !half_closed_ && held < (started_ ? kHeld : 1)) {
        reading_ = true;
        this->StartRead(&incoming_);
      }
    }
    if constexpr (kWrites) {
      if (status_.ok() && started_ && wanted_ && !producing_ && !writing_ && !produced_all_) {
        RunProduce();
      }
    }
    const bool complete = ended_ && !stop_ && (!kWrites || produced_all_);
    if (status_.ok() && !complete) return;
    if (!status_.ok()) waiting_.clear();
    if (taking_ || producing_ || writing_ || stop_) return;
    Drop();
    if (response_ != nullptr && status_.ok()) {
      life_.Sent(static_cast<int64_t>(response_->Length()));
    }
    finished_ = true;
    this->Finish(ToGrpc(status_));
  }

  // Runs Take or End as a task.
  void RunTake(const std::function<absl::Status()>& work) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    taking_ = true;
    // Guarded: with an exception nobody would say that it is over.
    absl::Status posted = base::RunGuarded([&] {
      return Post({.run = work, .done = [this](absl::Status status) { Taken(status); }});
    });
    if (posted.ok()) return;
    taking_ = false;
    SetFailure(std::move(posted));
  }

  void Taken(const absl::Status& status) {
    Enter([this, &status]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      taking_ = false;
      if (!status.ok() && on_drain_ != OnDrain::kIgnore) CountRejection(status);
      if (status.ok()) started_ = true;
      if (ending_ && status.ok()) ended_ = true;
      wanted_ = true;
      SetFailure(status);
    });
  }

  void RunProduce() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if constexpr (kWrites) {
      producing_ = true;
      wanted_ = false;
      absl::Status posted = base::RunGuarded([this] {
        const auto made = std::make_shared<Produced>(Produced::kNothingYet);
        return env_.environment.pool.Post(
            {.run =
                 [this, made] {
                   absl::StatusOr<Produced> produced = Produce(&outgoing_);
                   if (produced.ok()) *made = *produced;
                   return produced.status();
                 },
             .done =
                 [this, made](const absl::Status& status) {
                   Enter([this, &made, &status]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
                     producing_ = false;
                     SetFailure(status);
                     if (!status_.ok()) return;
                     if (*made == Produced::kEnd) produced_all_ = true;
                     if (*made == Produced::kMessage) {
                       writing_ = true;
                       this->StartWrite(&outgoing_);
                     }
                   });
                 }});
      });
      if (posted.ok()) return;
      producing_ = false;
      SetFailure(std::move(posted));
    }
  }

  // Counts a message that was refused: the first for whatever reason a code tells, later ones where
  // they are invalid. Other reasons are counted where they arise.
  void CountRejection(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Observer& observer = env_.environment.observer;
    if (absl::IsInvalidArgument(status)) {
      observer.Rejected(Rejection::kInvalid);
    } else if (!started_ && absl::IsUnimplemented(status)) {
      observer.Rejected(Rejection::kNotOffered);
    } else if (!started_ && absl::IsUnavailable(status)) {
      observer.Rejected(Rejection::kDraining);
    }
  }

  grpc::CallbackServerContext* const context_;
  Bytes* const response_;
  const OnDrain on_drain_;

  base::Mutex mu_;
  std::deque<Bytes> waiting_ ABSL_GUARDED_BY(mu_);
  bool started_ ABSL_GUARDED_BY(mu_) = false;       // the first message was taken
  bool reading_ ABSL_GUARDED_BY(mu_) = false;       // a StartRead is outstanding
  bool writing_ ABSL_GUARDED_BY(mu_) = false;       // a StartWrite is outstanding
  bool half_closed_ ABSL_GUARDED_BY(mu_) = false;   // the client has no more to say
  bool taking_ ABSL_GUARDED_BY(mu_) = false;        // Take or End is under way
  bool ending_ ABSL_GUARDED_BY(mu_) = false;        // it is End
  bool ended_ ABSL_GUARDED_BY(mu_) = false;         // End succeeded
  bool producing_ ABSL_GUARDED_BY(mu_) = false;     // Produce is under way
  bool produced_all_ ABSL_GUARDED_BY(mu_) = false;  // it said kEnd
  bool wanted_ ABSL_GUARDED_BY(mu_) = false;        // there may be something to produce
  bool finished_ ABSL_GUARDED_BY(mu_) = false;      // Finish was called
  // Set while work goes on that End started.
  std::function<void(absl::StatusCode)> stop_ ABSL_GUARDED_BY(mu_);
  absl::Status status_ ABSL_GUARDED_BY(mu_);  // the first failure
  // gRPC's while reading_; Produce's while producing_, gRPC's while writing_.
  Bytes incoming_;
  Bytes outgoing_;
};

// Makes a call and begins it. A caller without a token that serves gets its refusal, counted and
// logged like any other call's end. gRPC owns the call until OnDone.
template <typename C, typename... More>
C* StartCall(grpc::CallbackServerContext* context, const CallEnvironment& environment,
             const RpcMethod& method, Scope scope, const Bytes* request, Bytes* response,
             More&&... more) {
  absl::StatusOr<Tenant> tenant = environment.auth->Authenticate(*context, scope);
  auto* const call = new C(CallStart{.context = context,
                                     .environment = environment,
                                     .method = method,
                                     .tenant = tenant.ok() ? *tenant : Tenant(),
                                     .refused = tenant.status(),
                                     .request = request,
                                     .response = response},
                           std::forward<More>(more)...);
  call->Begin();
  return call;
}

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_CALL_H_
