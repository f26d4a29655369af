// One try of an Accumulate call.
#ifndef CERTIQ_CLIENT_CPP_SRC_ACCUMULATE_CALL_H_
#define CERTIQ_CLIENT_CPP_SRC_ACCUMULATE_CALL_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <stop_token>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "certiq/v1/calibration_service.grpc.pb.h"
#include "retry_loop.h"

namespace certiq {

// The owner's thread writes; a thread of this object reads positions until the call ends. All
// methods are for the owner's thread.
class AccumulateCall {
 public:
  // Opens the stream and sends the header.
  AccumulateCall(v1::CalibrationService::StubInterface* stub, const v1::AccumulateHeader& header,
                 absl::Time deadline, const std::stop_token& cancel);
  AccumulateCall(const AccumulateCall&) = delete;
  AccumulateCall& operator=(const AccumulateCall&) = delete;
  // Cancels the call unless Finish() was called.
  ~AccumulateCall();

  // Waits for the first position; nullopt where the call ended before.
  std::optional<v1::StreamProgress> WaitForFirst();
  // Waits until chunks from `sequence` on are durable; false where the call ended before.
  bool WaitForDurableBeyond(int64_t sequence);
  // False where the server takes no more, because the call has ended or is about to.
  bool Send(const v1::AccumulateRequest& chunk);
  // Half-closes the stream and waits until the call ends.
  void CloseAndWait();

  // The last position that the server reported; empty before the first one.
  v1::StreamProgress latest() const;

  // Waits for the end; to be called once. Positions that break the contract are INTERNAL and
  // `local`.
  AttemptOutcome Finish();

 private:
  using Stream = grpc::ClientReaderWriterInterface<v1::AccumulateRequest, v1::AccumulateResponse>;

  void ReadAll();
  absl::Status Take(const v1::StreamProgress& progress) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const v1::AccumulateHeader header_;
  CallContext context_;
  std::unique_ptr<Stream> stream_;
  bool wrote_ = false;

  mutable base::Mutex mutex_;
  base::ConditionVariable changed_;
  std::optional<v1::StreamProgress> latest_ ABSL_GUARDED_BY(mutex_);
  absl::Status read_error_ ABSL_GUARDED_BY(mutex_);
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;

  // The last member, because the thread uses all the others.
  std::thread reader_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_ACCUMULATE_CALL_H_
