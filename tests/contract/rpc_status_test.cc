#include "contract/rpc_status.h"

#include <gtest/gtest.h>

#include <string>

#include "google/rpc/error_details.pb.h"
#include "tests/support/text.h"

namespace certiq::server {
namespace {

// The details of a status; empty messages where there are none.
struct Details {
  google::rpc::BadRequest bad_request;
  google::rpc::PreconditionFailure precondition;
  google::rpc::RetryInfo retry;
};

Details DetailsOf(const google::rpc::Status& status) {
  Details details;
  for (const auto& any : status.details()) {
    EXPECT_TRUE(any.UnpackTo(&details.bad_request) || any.UnpackTo(&details.precondition) ||
                any.UnpackTo(&details.retry));
  }
  return details;
}

TEST(RpcStatusTest, CodeAndMessageArrive) {
  for (int code = 1; code <= 16; ++code) {
    const google::rpc::Status status =
        ToRpcStatus(absl::Status(static_cast<absl::StatusCode>(code), "why"));
    EXPECT_EQ(status.code(), code);
    EXPECT_EQ(status.message(), "why");
    EXPECT_EQ(status.details_size(), 0);
  }
}

TEST(RpcStatusTest, FieldBecomesBadRequest) {
  const google::rpc::Status status =
      ToRpcStatus(base::InvalidField("spec.bits", "expected 2 to 8, got 9"));
  EXPECT_EQ(status.message(), "spec.bits: expected 2 to 8, got 9");
  const Details details = DetailsOf(status);
  ASSERT_EQ(details.bad_request.field_violations_size(), 1);
  EXPECT_EQ(details.bad_request.field_violations(0).field(), "spec.bits");
  EXPECT_EQ(details.bad_request.field_violations(0).description(), "expected 2 to 8, got 9");
}

TEST(RpcStatusTest, PreconditionBecomesPreconditionFailure) {
  const Details details = DetailsOf(
      ToRpcStatus(base::PreconditionError("DAMPING", "spec.damping", "three attempts failed")));
  ASSERT_EQ(details.precondition.violations_size(), 1);
  EXPECT_EQ(details.precondition.violations(0).type(), "DAMPING");
  EXPECT_EQ(details.precondition.violations(0).subject(), "spec.damping");
  EXPECT_EQ(details.precondition.violations(0).description(), "three attempts failed");
}

TEST(RpcStatusTest, RetryDelayBecomesRetryInfo) {
  absl::Status status = absl::ResourceExhaustedError("full");
  base::SetRetryAfter(status, std::chrono::milliseconds(2500));
  const Details details = DetailsOf(ToRpcStatus(status));
  EXPECT_EQ(details.retry.retry_delay().seconds(), 2);
  EXPECT_EQ(details.retry.retry_delay().nanos(), 500'000'000);
}

}  // namespace
}  // namespace certiq::server
