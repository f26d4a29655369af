// Calls that stream an answer: one machine for all of them.

#ifndef CERTIQ_RPC_CALLS_SENDING_REACTOR_H_
#define CERTIQ_RPC_CALLS_SENDING_REACTOR_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <mutex>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "contract/rpc_status.h"
#include "rpc/calls/call_life.h"
#include "runtime/worker_pool.h"

namespace certiq::server {

// Makes a message, as a task, when the one before is out, so that a slow reader holds one message
// and no more. The rules of MessageReactor hold.
template <typename Message>
class SendingReactor : public grpc::ServerWriteReactor<Message>, public LiveCall {
 public:
  // What Make found.
  enum class Made { kMessage, kNothingYet, kEnd };

  SendingReactor(grpc::CallbackServerContext* context, const CallEnvironment& environment,
                 const RpcMethod& method, const Tenant& tenant, int64_t request_bytes)
      : env_(environment),
        tenant_(tenant),
        life_(this, method, environment, tenant.name),
        context_(context) {
    life_.Received(request_bytes);
  }

  // Once, after construction.
  void Begin() { Changed(); }

  void OnWriteDone(bool ok) override {
    if (!ok) OnCancel();
    const std::lock_guard lock(mu_);
    writing_ = false;
    if (ok) life_.Sent(static_cast<int64_t>(message_.ByteSizeLong()));
    wanted_ = true;
    Advance();
  }
  void OnCancel() override { Fail(life_.CancelReason(*context_)); }
  void Abort(const absl::Status& reason, bool only_waiting) override {
    if (!only_waiting || EndsWithDrain()) Fail(reason);
  }
  void OnDone() override {
    absl::Status status;
    {
      const std::lock_guard lock(mu_);
      status = status_;
    }
    Gone();
    life_.Over(std::move(status));
    delete this;
  }

 protected:
  // Alone, on the pool: fills the next message.
  virtual absl::StatusOr<Made> Make(Message& message) = 0;
  // Nothing of the call runs any more, no lock is held.
  virtual void Gone() {}
  virtual absl::Status Post(WorkerPool::Task task) { return env_.jobs.pool.Post(std::move(task)); }
  virtual bool EndsWithDrain() const { return false; }

  // There may be something to send; any thread, without the lock.
  void Changed() {
    const std::lock_guard lock(mu_);
    wanted_ = true;
    Advance();
  }
  void Fail(absl::Status status) {
    const std::lock_guard lock(mu_);
    if (status_.ok()) status_ = std::move(status);
    Advance();
  }

  const CallEnvironment& env_;
  const Tenant tenant_;
  CallLife life_;

 private:
  void Advance() {
    if (finished_ || busy_ || writing_) return;
    if (status_.ok() && !ended_) {
      if (!wanted_) return;
      wanted_ = false;
      busy_ = true;
      absl::Status posted =
          Post({.run =
                    [this] {
                      message_.Clear();
                      absl::StatusOr<Made> made = Make(message_);
                      if (made.ok()) made_ = *made;
                      return made.status();
                    },
                .done = [this](absl::Status status) { OnMade(std::move(status)); }});
      if (posted.ok()) return;
      busy_ = false;
      status_ = std::move(posted);
    }
    finished_ = true;
    this->Finish(ToGrpc(status_));
  }

  void OnMade(absl::Status status) {
    const std::lock_guard lock(mu_);
    busy_ = false;
    if (!status.ok()) {
      if (status_.ok()) status_ = std::move(status);
    } else if (made_ == Made::kEnd) {
      ended_ = true;
    } else if (made_ == Made::kMessage && status_.ok()) {
      writing_ = true;
      this->StartWrite(&message_);
    }
    Advance();
  }

  grpc::CallbackServerContext* const context_;
  std::mutex mu_;
  // All guarded by mu_; message_ and made_ belong to the task while busy_.
  bool wanted_ = false;
  bool busy_ = false;
  bool writing_ = false;
  bool ended_ = false;
  bool finished_ = false;
  absl::Status status_;
  Message message_;
  Made made_ = Made::kNothingYet;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_CALLS_SENDING_REACTOR_H_
