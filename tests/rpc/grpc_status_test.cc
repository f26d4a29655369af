#include "rpc/calls/grpc_status.h"

#include <gtest/gtest.h>

#include <string>

#include "base/status.h"
#include "support/text.h"
#include "test_server.h"

namespace certiq::server {
namespace {

TEST(GrpcStatusTest, CodesKeepTheirNumbers) {
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  for (int code = 1; code <= 16; ++code) {
    const grpc::Status status = ToGrpc(absl::Status(static_cast<absl::StatusCode>(code), "why"));
    EXPECT_EQ(static_cast<int>(status.error_code()), code);
    EXPECT_EQ(status.error_message(), "why");
  }
}

TEST(GrpcStatusTest, FieldBecomesBadRequest) {
  const grpc::Status status = ToGrpc(base::InvalidField("spec.bits", "expected 2 to 8, got 9"));
  EXPECT_EQ(status.error_message(), "spec.bits: expected 2 to 8, got 9");
  const auto details = testing::DetailsOf(status);
  ASSERT_EQ(details.bad_request.field_violations_size(), 1);
  EXPECT_EQ(details.bad_request.field_violations(0).field(), "spec.bits");
  EXPECT_EQ(details.bad_request.field_violations(0).description(), "expected 2 to 8, got 9");
}

TEST(GrpcStatusTest, PreconditionBecomesPreconditionFailure) {
  const auto details = testing::DetailsOf(
      ToGrpc(base::PreconditionError("DAMPING", "spec.damping", "three attempts failed")));
  ASSERT_EQ(details.precondition.violations_size(), 1);
  EXPECT_EQ(details.precondition.violations(0).type(), "DAMPING");
  EXPECT_EQ(details.precondition.violations(0).subject(), "spec.damping");
  EXPECT_EQ(details.precondition.violations(0).description(), "three attempts failed");
}

TEST(GrpcStatusTest, RetryDelayBecomesRetryInfo) {
  absl::Status status = absl::ResourceExhaustedError("full");
  base::SetRetryAfter(status, std::chrono::milliseconds(2500));
  const auto details = testing::DetailsOf(ToGrpc(status));
  EXPECT_EQ(details.retry.retry_delay().seconds(), 2);
  EXPECT_EQ(details.retry.retry_delay().nanos(), 500'000'000);
}

TEST(GrpcStatusTest, LongMessagesFitTheMetadata) {
  for (const std::string& unit : {std::string("x"), std::string("\u00e9"), std::string("\x01")}) {
    std::string text;
    while (text.size() < 100'000) text += unit;
    const grpc::Status status = ToGrpc(base::InvalidField("x", text));
    // grpc-message is percent-encoded, grpc-status-details-bin base64.
    EXPECT_LT(3 * status.error_message().size() / (unit == "x" ? 3 : 1) +
                  status.error_details().size() * 4 / 3,
              7000);
    EXPECT_CONTAINS(status.error_message(), "...");
    // Protobuf would refuse half a character.
    EXPECT_EQ(testing::DetailsOf(status).field(), "x");
  }
}

}  // namespace
}  // namespace certiq::server
