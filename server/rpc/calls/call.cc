#include "rpc/calls/call.h"

#include <memory>

#include "absl/strings/str_cat.h"
#include "base/exception_guard.h"
#include "base/status.h"
#include "rpc/calls/grpc_status.h"

namespace certiq::server {
namespace {

// Messages that are held of one call, the one that is being taken included.
constexpr size_t kHeld = 2;

// How long a client may take to bring a call's first whole message.
constexpr std::chrono::seconds kFirstMessageLimit{60};
// How long a client may leave a written message unread.
constexpr std::chrono::seconds kWriteLimit{60};

absl::Status TooLong(absl::string_view what, std::chrono::milliseconds limit) {
  absl::Status status = absl::AbortedError(absl::StrCat(
      what, " within ", std::chrono::duration_cast<std::chrono::seconds>(limit).count(),
      " s; what the call held was given back"));
  base::SetRetryAfter(status, base::kRetrySoon);
  return status;
}

}  // namespace

Call::Call(CallStart start, OnDrain on_drain)
    : env_(start.environment),
      limits_(start.limits),
      caller_(std::move(start.caller)),
      life_(this, start.method, start.environment, caller_.tenant.name),
      method_(start.method),
      context_(start.context),
      on_drain_(on_drain),
      held_(std::move(start.held)),
      status_(std::move(start.refused)) {}

void Call::Begin() {
  // First in the registry, then a look at the pool: a drain that begins between the two finds this
  // call in the registry.
  life_.Begin();
  Enter([this]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (status_.ok() && on_drain_ != OnDrain::kIgnore && !env_.environment.pool.admitting()) {
      env_.environment.observer.Rejected(Rejection::kDraining);
      SetFailure(base::DrainingError());
    }
  });
}

void Call::OnCancel() { Fail(life_.CancelReason(*context_)); }

void Call::Abort(const absl::Status& reason, bool only_waiting) {
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

void Call::Supervise(std::chrono::steady_clock::time_point now) {
  if (absl::Status known = env_.auth->Recheck(caller_); !known.ok()) {
    Fail(std::move(known));
  }
  Enter([this, now]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (finished_) return;
    const std::chrono::milliseconds idle = started_ ? limits_.idle : kFirstMessageLimit;
    if (reading_ && !taking_ && idle.count() > 0 && now - reading_since_ > idle) {
      SetFailure(TooLong("expected the next whole message", idle));
    }
    if (writing_ && !cancelling_ && now - writing_since_ > kWriteLimit) {
      SetFailure(TooLong("the client did not read an answer", kWriteLimit));
      CancelWrite();
    }
  });
}

void Call::OnDone() {
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

void Call::Changed() {
  Enter([this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { wanted_ = true; });
}

void Call::Fail(absl::Status status) {
  Enter([this, &status]() ABSL_NO_THREAD_SAFETY_ANALYSIS { SetFailure(std::move(status)); });
}

void Call::WorkStarted(std::function<void(absl::StatusCode)> stop) {
  Enter([this, &stop]() ABSL_NO_THREAD_SAFETY_ANALYSIS { stop_ = std::move(stop); });
}

void Call::WorkEnded(absl::Status status) {
  Enter([this, &status]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    stop_ = nullptr;
    wanted_ = true;
    SetFailure(std::move(status));
  });
}

absl::Status Call::Hold(int64_t bytes) {
  const base::MutexLock lock(mu_);
  return bytes > held_.bytes() ? held_.Resize(bytes, "this answer") : absl::OkStatus();
}

bool Call::ended() {
  const base::MutexLock lock(mu_);
  return ended_;
}

void Call::OnReadDone(bool ok) {
  // A call that ends early ends its reads too; that is no half-close.
  if (!ok && context_->IsCancelled()) OnCancel();
  Enter([this, ok]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    reading_ = false;
    if (!ok) {
      half_closed_ = true;
      if (!streams_requests() && !received_) {
        SetFailure(base::InvalidField("payload", "expected one message, the stream ended without"));
      }
      return;
    }
    received_ = true;
    // A call of one message is answered without waiting for the half-close.
    if (!streams_requests()) half_closed_ = true;
    const auto bytes = static_cast<int64_t>(incoming_.Length());
    life_.Received(bytes);
    Bytes message;
    message.Swap(&incoming_);
    if (bytes > limits_.message_bytes) {
      SetFailure(base::InvalidField(
          "payload",
          absl::StrCat("expected at most ", limits_.message_bytes, " bytes, got ", bytes)));
    }
    if (status_.ok()) waiting_.push_back(std::move(message));
  });
}

void Call::OnWriteDone(bool ok) {
  // Writes fail only where the call is over; without this the rest would be thrown after it.
  if (!ok) OnCancel();
  Enter([this, ok]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    writing_ = false;
    if (ok) life_.Sent(static_cast<int64_t>(outgoing_.Length()));
    outgoing_.Clear();
    wanted_ = true;
  });
}

template <typename Change>
void Call::Enter(const Change& change) {
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

void Call::SetFailure(absl::Status status) {
  if (status.ok() || !status_.ok()) return;
  status_ = std::move(status);
  cancellation_.Cancel(status_.code());
}

void Call::Advance() {
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
  const size_t held = waiting_.size() + (taking_ ? 1 : 0);
  if (status_.ok() && !reading_ && !half_closed_ && held < (started_ ? kHeld : 1)) {
    reading_ = true;
    reading_since_ = Clock::now();
    StartRead(&incoming_);
  }
  if (streams_answers()) {
    if (status_.ok() && started_ && wanted_ && !producing_ && !writing_ && !produced_all_) {
      RunProduce();
    }
  } else if (status_.ok() && ended_ && !stop_ && !produced_all_) {
    produced_all_ = true;
    outgoing_.Swap(&answer_);
    Write();
  }
  const bool complete = ended_ && !stop_ && produced_all_;
  if (status_.ok() && !complete) return;
  if (!status_.ok()) waiting_.clear();
  if (taking_ || producing_ || writing_ || cancelling_ || stop_) return;
  Drop();
  held_.Release();
  finished_ = true;
  Finish(ToGrpc(status_));
}

void Call::RunTake(const std::function<absl::Status()>& work) {
  taking_ = true;
  // Guarded: with an exception nobody would say that it is over.
  absl::Status posted = base::RunGuarded([&] {
    return Post({.run = work, .done = [this](const absl::Status& status) { Taken(status); }});
  });
  if (posted.ok()) return;
  taking_ = false;
  SetFailure(std::move(posted));
}

void Call::Taken(const absl::Status& status) {
  Enter([this, &status]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    taking_ = false;
    // The time that the server took is not the client's.
    if (reading_) reading_since_ = Clock::now();
    if (!status.ok() && on_drain_ != OnDrain::kIgnore) CountRejection(status);
    if (status.ok()) started_ = true;
    if (ending_ && status.ok()) ended_ = true;
    wanted_ = true;
    SetFailure(status);
  });
}

void Call::RunProduce() {
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
                 if (*made == Produced::kMessage) Write();
               });
             }});
  });
  if (posted.ok()) return;
  producing_ = false;
  SetFailure(std::move(posted));
}

void Call::Write() {
  writing_ = true;
  writing_since_ = Clock::now();
  StartWrite(&outgoing_);
}

void Call::CancelWrite() {
  cancelling_ = true;
  const absl::Status posted = env_.environment.pool.Post(
      {.run =
           [this] {
             // It may run reactions of this call, but not its OnDone.
             context_->TryCancel();
             return absl::OkStatus();
           },
       .done =
           [this](const absl::Status& /*status*/) {
             Enter([this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { cancelling_ = false; });
           }});
  // A shutdown, which cancels every call.
  if (!posted.ok()) cancelling_ = false;
}

void Call::CountRejection(const absl::Status& status) {
  Observer& observer = env_.environment.observer;
  if (absl::IsInvalidArgument(status)) {
    observer.Rejected(Rejection::kInvalid);
  } else if (!started_ && absl::IsUnimplemented(status)) {
    observer.Rejected(Rejection::kNotOffered);
  } else if (!started_ && absl::IsUnavailable(status)) {
    observer.Rejected(Rejection::kDraining);
  }
}

}  // namespace certiq::server
