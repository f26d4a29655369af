// One try of an Accumulate call.
#ifndef CERTIQ_CLIENT_CPP_SRC_ACCUMULATE_CALL_H_
#define CERTIQ_CLIENT_CPP_SRC_ACCUMULATE_CALL_H_

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "certiq/v1/calibration_service.grpc.pb.h"
#include "tries.h"

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

  // Waits for the first answer. nullopt: the call ended.
  std::optional<v1::StreamProgress> WaitForFirst();
  // Waits until chunks from `sequence` on are durable. False: the call ended before.
  bool WaitForDurableBeyond(int64_t sequence);
  // False: the server takes no more, the call has ended or is about to.
  bool Send(const v1::AccumulateRequest& chunk);
  // Nothing more will be sent; waits until the call ends.
  void CloseAndWait();

  // As the server said last; nothing before the first answer.
  v1::StreamProgress latest() const;

  // Waits for the end. Positions that make no sense are INTERNAL, and `local`. Once.
  AttemptOutcome Finish();

 private:
  using Stream = grpc::ClientReaderWriterInterface<v1::AccumulateRequest, v1::AccumulateResponse>;

  void ReadAll();
  absl::Status Take(const v1::StreamProgress& progress);

  const v1::AccumulateHeader header_;
  CallContext context_;
  std::unique_ptr<Stream> stream_;
  bool wrote_ = false;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::optional<v1::StreamProgress> latest_;
  absl::Status read_error_;
  bool ended_ = false;

  // Last: it uses everything above.
  std::thread reader_;
};

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_SRC_ACCUMULATE_CALL_H_
