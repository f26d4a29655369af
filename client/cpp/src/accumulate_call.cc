#include "accumulate_call.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace certiq {

AccumulateCall::AccumulateCall(v1::CalibrationService::StubInterface* stub,
                               const v1::AccumulateHeader& header, absl::Time deadline,
                               const std::stop_token& cancel)
    : header_(header), context_(deadline, cancel), stream_(stub->Accumulate(context_.get())) {
  v1::AccumulateRequest first;
  *first.mutable_header() = header_;
  reader_ = std::thread([this] { ReadAll(); });
  wrote_ = stream_->Write(first);
}

AccumulateCall::~AccumulateCall() {
  if (!reader_.joinable()) return;
  context_.get()->TryCancel();
  Finish();
}

std::optional<v1::StreamProgress> AccumulateCall::WaitForFirst() {
  const base::MutexLock lock(mutex_);
  while (!latest_.has_value() && !ended_) changed_.Wait(mutex_);
  return ended_ ? std::nullopt : latest_;
}

bool AccumulateCall::WaitForDurableBeyond(int64_t sequence) {
  const base::MutexLock lock(mutex_);
  while (!ended_ && latest_->durable() <= sequence) changed_.Wait(mutex_);
  return latest_->durable() > sequence;
}

bool AccumulateCall::Send(const v1::AccumulateRequest& chunk) {
  {
    const base::MutexLock lock(mutex_);
    if (ended_) return false;
  }
  return stream_->Write(chunk);
}

void AccumulateCall::CloseAndWait() {
  stream_->WritesDone();
  const base::MutexLock lock(mutex_);
  while (!ended_) changed_.Wait(mutex_);
}

v1::StreamProgress AccumulateCall::latest() const {
  const base::MutexLock lock(mutex_);
  return latest_.value_or(v1::StreamProgress());
}

AttemptOutcome AccumulateCall::Finish() {
  reader_.join();
  const grpc::Status status = stream_->Finish();
  const base::MutexLock lock(mutex_);
  AttemptOutcome outcome = context_.Outcome(status, wrote_ || latest_.has_value());
  if (!read_error_.ok()) {
    outcome.status = read_error_;
    outcome.local = true;
  }
  return outcome;
}

void AccumulateCall::ReadAll() {
  v1::AccumulateResponse response;
  while (stream_->Read(&response)) {
    const base::MutexLock lock(mutex_);
    if (!read_error_.ok()) continue;  // Cancelled: what is still under way is dropped.
    read_error_ = Take(response.progress());
    if (!read_error_.ok()) context_.get()->TryCancel();
    changed_.NotifyAll();
  }
  const base::MutexLock lock(mutex_);
  ended_ = true;
  changed_.NotifyAll();
}

absl::Status AccumulateCall::Take(const v1::StreamProgress& progress) {
  const int64_t least_received = latest_.has_value() ? latest_->received() : 0;
  const int64_t least_durable = latest_.has_value() ? latest_->durable() : 0;
  if (progress.stream_id() != header_.stream_id() || progress.received() < least_received ||
      progress.durable() < least_durable || progress.durable() > progress.received()) {
    return absl::InternalError(absl::StrCat(
        "the server's answer breaks the contract: progress: expected stream \"",
        header_.stream_id(), "\" with ", least_durable,
        " <= durable <= received and received >= ", least_received, ", got \"",
        progress.stream_id(), "\", ", progress.durable(), " and ", progress.received()));
  }
  latest_ = progress;
  return absl::OkStatus();
}

}  // namespace certiq
