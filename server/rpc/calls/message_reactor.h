// Calls whose client streams messages: one machine for all of them.

#ifndef CERTIQ_RPC_CALLS_MESSAGE_REACTOR_H_
#define CERTIQ_RPC_CALLS_MESSAGE_REACTOR_H_

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "contract/rpc_status.h"
#include "rpc/calls/call_life.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

using Bytes = grpc::ByteBuffer;

template <typename Message>
absl::StatusOr<Message> Parse(const Bytes& buffer, const char* name) {
  Bytes copy = buffer;  // of references; the reader wants one it may change
  grpc::ProtoBufferReader reader(&copy);
  Message message;
  if (reader.status().ok() && message.ParseFromZeroCopyStream(&reader)) return message;
  return base::InvalidField("payload", absl::StrCat("expected ", name, ", got ", buffer.Length(),
                                                    " bytes that do not parse as one"));
}

template <typename Message>
bool Serialize(const Message& message, Bytes* buffer) {
  bool own = false;  // the buffer; always so
  return grpc::SerializationTraits<Message>::Serialize(message, buffer, &own).ok();
}

// `Base` is a ServerReadReactor or ServerBidiReactor of byte buffers. Messages are taken one at a
// time, in order, as tasks; two are held at most, and beyond that nothing is read: flow control
// stops the client. Finish is called in one place, when nothing of the call is under way.
//
// One mutex guards the state; hooks marked "alone" run without it, one at a time, the others with
// it. A reactor is made by its factory, then told to Begin; it deletes itself when gRPC is done.
template <typename Base>
class MessageReactor : public Base, public LiveCall {
 public:
  MessageReactor(grpc::CallbackServerContext* context, const CallEnvironment& environment,
                 const RpcMethod& method, const Tenant& tenant)
      : env_(environment),
        tenant_(tenant),
        life_(this, method, environment, tenant.name),
        context_(context) {}

  // Once, after construction.
  void Begin() {
    const std::lock_guard lock(mu_);
    Advance();
  }

  void OnReadDone(bool ok) override {
    // A call that ends early ends its reads too; that is no half-close.
    if (!ok && context_->IsCancelled()) OnCancel();
    const std::lock_guard lock(mu_);
    reading_ = false;
    if (ok) {
      life_.Received(static_cast<int64_t>(incoming_.Length()));
      Bytes message;
      message.Swap(&incoming_);
      if (status_.ok()) {
        if (!seen_) {
          absl::Status taken = First(message);
          CountRejection(taken, env_.jobs.observer);
          SetFailure(std::move(taken));
        }
        seen_ = true;
        waiting_.push_back(std::move(message));
      }
    } else {
      half_closed_ = true;
    }
    Advance();
  }

  void OnCancel() override { Fail(life_.CancelReason(*context_)); }

  void Abort(const absl::Status& reason, bool only_waiting) override {
    if (!only_waiting || EndsWithDrain()) Fail(reason);
  }

  void OnDone() override {
    absl::Status status;
    {
      // Whoever called Finish may still be about to unlock.
      const std::lock_guard lock(mu_);
      status = status_;
    }
    Gone();
    life_.Over(std::move(status));
    delete this;
  }

 protected:
  // With the lock: the first message as it arrives, on gRPC's thread.
  virtual absl::Status First(const Bytes& /*message*/) { return absl::OkStatus(); }
  // Alone: takes a message.
  virtual absl::Status Take(const Bytes& message) = 0;
  // Alone, after the last one. The response of a unary answer is made here.
  virtual absl::Status End() = 0;
  // With the lock: the next message to write, if there is one. Bidirectional calls only.
  virtual bool Next(Bytes* /*outgoing*/) { return false; }
  // With the lock: lets go of what the call holds, before the client hears its end.
  virtual void Drop() {}
  // Nothing of the call runs any more, no lock is held.
  virtual void Gone() {}
  // How tasks are run.
  virtual absl::Status Post(WorkerPool::Task task) { return env_.jobs.pool.Post(std::move(task)); }
  // Whether a drain ends the call at once rather than waiting for it.
  virtual bool EndsWithDrain() const { return false; }

  // What OnWriteDone of a bidirectional call does.
  void WriteDone(bool ok) {
    if (!ok) OnCancel();
    const std::lock_guard lock(mu_);
    writing_ = false;
    if (ok) life_.Sent(static_cast<int64_t>(outgoing_.Length()));
    outgoing_.Clear();
    Advance();
  }

  // Something to write may be there; any thread, without the lock.
  void Changed() {
    const std::lock_guard lock(mu_);
    Advance();
  }
  void Fail(absl::Status status) {
    const std::lock_guard lock(mu_);
    SetFailure(std::move(status));
    Advance();
  }
  // UNAVAILABLE where the server takes no new work.
  absl::Status Draining() const {
    if (env_.jobs.pool.admitting()) return absl::OkStatus();
    return absl::UnavailableError("the server is draining and takes no new work");
  }
  // With the lock. The client has no more to say.
  bool half_closed() const { return half_closed_; }
  // With the lock. Keeps the first failure.
  void SetFailure(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  const CallEnvironment& env_;
  const Tenant tenant_;
  CallLife life_;
  std::mutex mu_;

 private:
  static constexpr size_t kHeld = 2;
  static constexpr bool kWrites = std::is_base_of_v<grpc::ServerBidiReactor<Bytes, Bytes>, Base>;

  void Advance() {
    if (finished_) return;
    if (status_.ok() && !busy_ && !ended_) {
      if (!waiting_.empty()) {
        const auto message = std::make_shared<Bytes>(std::move(waiting_.front()));
        waiting_.pop_front();
        Run([this, message] { return Take(*message); });
      } else if (half_closed_) {
        ending_ = true;
        Run([this] { return End(); });
      }
    }
    const size_t held = waiting_.size() + (busy_ ? 1 : 0);
    if (status_.ok() && !reading_ && !half_closed_ && held < kHeld) {
      reading_ = true;
      this->StartRead(&incoming_);
    }
    if constexpr (kWrites) {
      if (status_.ok() && !writing_ && Next(&outgoing_)) {
        writing_ = true;
        this->StartWrite(&outgoing_);
      }
    }
    if (status_.ok() && !ended_) return;
    if (!status_.ok()) waiting_.clear();
    if (busy_ || writing_) return;
    Drop();
    if constexpr (!kWrites) {
      if (status_.ok()) life_.Sent(ResponseBytes());
    }
    finished_ = true;
    this->Finish(ToGrpc(status_));
  }

  void Run(const std::function<absl::Status()>& work) {
    busy_ = true;
    absl::Status posted = Post({.run = work, .done = [this](absl::Status status) {
                                  const std::lock_guard lock(mu_);
                                  busy_ = false;
                                  if (ending_ && status.ok()) ended_ = true;
                                  SetFailure(std::move(status));
                                  Advance();
                                }});
    if (posted.ok()) return;
    busy_ = false;
    SetFailure(std::move(posted));
  }

 protected:
  // Of a unary answer, for the log.
  virtual int64_t ResponseBytes() const { return 0; }

 private:
  grpc::CallbackServerContext* const context_;
  // All guarded by mu_.
  bool seen_ = false;
  bool reading_ = false;
  bool writing_ = false;
  bool half_closed_ = false;
  bool busy_ = false;    // a task is on the pool
  bool ending_ = false;  // it is End
  bool ended_ = false;   // End succeeded
  bool finished_ = false;
  absl::Status status_;
  Bytes incoming_;
  Bytes outgoing_;
  std::deque<Bytes> waiting_;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_MESSAGE_REACTOR_H_
