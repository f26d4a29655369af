// Metric labels: the text of each enumerator, and arrays indexed by enumerators.

#ifndef CERTIQ_OBSERVABILITY_LABELS_H_
#define CERTIQ_OBSERVABILITY_LABELS_H_

#include <array>
#include <cstddef>

#include "absl/status/status.h"
#include "engine/run_context.h"
#include "engine/spec.h"
#include "observability/call_observer.h"
#include "observability/observer.h"

namespace certiq::server {

// The switches have no default: the compiler refuses an enumerator without a label. A number that
// is no enumerator has none (null).

constexpr const char* LabelOf(engine::Method method) {
  switch (method) {
    case engine::Method::kNearest:
      return "nearest";
    case engine::Method::kOptq:
      return "optq";
    case engine::Method::kQronos:
      return "qronos";
  }
  return nullptr;
}

constexpr const char* LabelOf(engine::Phase phase) {
  switch (phase) {
    case engine::Phase::kReceive:
      return "receive";
    case engine::Phase::kQueue:
      return "queue";
    case engine::Phase::kFactor:
      return "factor";
    case engine::Phase::kRound:
      return "round";
    case engine::Phase::kCertify:
      return "certify";
    case engine::Phase::kReference:
      return "reference";
    case engine::Phase::kPack:
      return "pack";
  }
  return nullptr;
}

constexpr const char* LabelOf(engine::StabilityCause cause) {
  switch (cause) {
    case engine::StabilityCause::kNone:
      return "none";
    case engine::StabilityCause::kPivot:
      return "pivot";
    case engine::StabilityCause::kNonFinite:
      return "non_finite";
    case engine::StabilityCause::kCondition:
      return "condition";
  }
  return nullptr;
}

constexpr const char* LabelOf(JobState state) {
  switch (state) {
    case v1::JOB_STATE_QUEUED:
      return "queued";
    case v1::JOB_STATE_RUNNING:
      return "running";
    case v1::JOB_STATE_SUCCEEDED:
      return "succeeded";
    case v1::JOB_STATE_FAILED:
      return "failed";
    case v1::JOB_STATE_CANCELLED:
      return "cancelled";
    case v1::JOB_STATE_EXPIRED:
      return "expired";
    // No job is in these: the contract's zero, and what protobuf adds to every enum.
    case v1::JOB_STATE_UNSPECIFIED:
    case v1::JobState_INT_MIN_SENTINEL_DO_NOT_USE_:
    case v1::JobState_INT_MAX_SENTINEL_DO_NOT_USE_:
      return nullptr;
  }
  return nullptr;
}

constexpr const char* LabelOf(Rejection reason) {
  switch (reason) {
    case Rejection::kInvalid:
      return "invalid";
    case Rejection::kNotOffered:
      return "not_offered";
    case Rejection::kQueueFull:
      return "queue_full";
    case Rejection::kOverBudget:
      return "over_budget";
    case Rejection::kQuota:
      return "quota";
    case Rejection::kDraining:
      return "draining";
  }
  return nullptr;
}

// What follows is in the spelling of go-grpc-prometheus.
constexpr const char* LabelOf(CallShape shape) {
  switch (shape) {
    case CallShape::kUnary:
      return "unary";
    case CallShape::kClientStream:
      return "client_stream";
    case CallShape::kServerStream:
      return "server_stream";
    case CallShape::kBidiStream:
      return "bidi_stream";
  }
  return nullptr;
}

constexpr const char* LabelOf(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return "OK";
    case absl::StatusCode::kCancelled:
      return "Canceled";
    case absl::StatusCode::kUnknown:
      return "Unknown";
    case absl::StatusCode::kInvalidArgument:
      return "InvalidArgument";
    case absl::StatusCode::kDeadlineExceeded:
      return "DeadlineExceeded";
    case absl::StatusCode::kNotFound:
      return "NotFound";
    case absl::StatusCode::kAlreadyExists:
      return "AlreadyExists";
    case absl::StatusCode::kPermissionDenied:
      return "PermissionDenied";
    case absl::StatusCode::kResourceExhausted:
      return "ResourceExhausted";
    case absl::StatusCode::kFailedPrecondition:
      return "FailedPrecondition";
    case absl::StatusCode::kAborted:
      return "Aborted";
    case absl::StatusCode::kOutOfRange:
      return "OutOfRange";
    case absl::StatusCode::kUnimplemented:
      return "Unimplemented";
    case absl::StatusCode::kInternal:
      return "Internal";
    case absl::StatusCode::kUnavailable:
      return "Unavailable";
    case absl::StatusCode::kDataLoss:
      return "DataLoss";
    case absl::StatusCode::kUnauthenticated:
      return "Unauthenticated";
    case absl::StatusCode::kDoNotUseReservedForFutureExpansionUseDefaultInSwitchInstead_:
      return nullptr;
  }
  return nullptr;
}

// REQUIRES of what follows: those enumerators of E that have labels count on without a gap.
// The first enumerator of E that has a label; those before it stand for nothing.
template <typename E>
constexpr size_t FirstLabel() {
  size_t first = 0;
  while (LabelOf(static_cast<E>(first)) == nullptr) ++first;
  return first;
}

template <typename E>
constexpr size_t LabelCount() {
  size_t count = 0;
  while (LabelOf(static_cast<E>(FirstLabel<E>() + count)) != nullptr) ++count;
  return count;
}

// Every enumerator of E that has a label.
template <typename E>
constexpr std::array<E, LabelCount<E>()> Labelled() {
  std::array<E, LabelCount<E>()> all{};
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<E>(FirstLabel<E>() + i);
  return all;
}

// A T for each label of E, zero-initialized.
template <typename E, typename T>
class ByLabel {
 public:
  T& operator[](E value) { return values_[static_cast<size_t>(value) - FirstLabel<E>()]; }

 private:
  std::array<T, LabelCount<E>()> values_{};
};

}  // namespace certiq::server

#endif  // CERTIQ_OBSERVABILITY_LABELS_H_
