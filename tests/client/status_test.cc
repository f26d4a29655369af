#include "certiq/status.h"

#include <string>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/support/status.h"
#include "gtest/gtest.h"

namespace certiq {
namespace {

TEST(StatusTest, CodeMessageAndAllDetailsArrive) {
  google::rpc::Status details;
  google::rpc::BadRequest bad_request;
  auto* violation = bad_request.add_field_violations();
  violation->set_field("spec.bits");
  violation->set_description("expected 2 to 8, got 9");
  details.add_details()->PackFrom(bad_request);
  bad_request.mutable_field_violations(0)->set_field("spec.polish");
  details.add_details()->PackFrom(bad_request);
  google::rpc::PreconditionFailure precondition;
  precondition.add_violations()->set_subject("damping");
  details.add_details()->PackFrom(precondition);
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(2);
  retry.mutable_retry_delay()->set_nanos(500'000'000);
  details.add_details()->PackFrom(retry);
  details.add_details()->set_type_url("type.googleapis.com/of.AnotherKind");

  const absl::Status status = FromGrpcStatus(grpc::Status(
      grpc::StatusCode::INVALID_ARGUMENT, "spec.bits: too many", details.SerializeAsString()));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "spec.bits: too many");
  const ErrorDetails read = DetailsOf(status);
  ASSERT_EQ(read.fields.size(), 2);
  EXPECT_EQ(read.fields[0].field, "spec.bits");
  EXPECT_EQ(read.fields[0].description, "expected 2 to 8, got 9");
  EXPECT_EQ(read.fields[1].field, "spec.polish");
  ASSERT_EQ(read.preconditions.size(), 1);
  EXPECT_EQ(read.preconditions[0].subject, "damping");
  EXPECT_EQ(read.retry_delay, absl::Milliseconds(2500));

  const absl::Status longer = WithSuffix(status, " (4 tries)");
  EXPECT_EQ(longer.message(), "spec.bits: too many (4 tries)");
  EXPECT_EQ(DetailsOf(longer).fields.size(), 2);
  EXPECT_TRUE(WithSuffix(absl::OkStatus(), "x").ok());
}

TEST(StatusTest, EveryGrpcCodeKeepsItsMeaning) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status =
        FromGrpcStatus(grpc::Status(static_cast<grpc::StatusCode>(code), "m"));
    EXPECT_EQ(static_cast<int>(status.code()), code);
  }
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
  for (const int code : {17, 31}) {
    const absl::Status status =
        FromGrpcStatus(grpc::Status(static_cast<grpc::StatusCode>(code), "m"));
    EXPECT_EQ(status.code(), absl::StatusCode::kUnknown);
  }
}

TEST(StatusTest, DetailsThatDoNotParseDoNotHideTheError) {
  absl::Status status =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::INTERNAL, "boom", "\xff\xff garbage"));
  EXPECT_EQ(status.message(), "boom");
  google::rpc::Status details;
  auto* const any = details.add_details();
  any->set_type_url("type.googleapis.com/google.rpc.BadRequest");
  any->set_value("\xff\xff");
  status =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::INTERNAL, "boom", details.SerializeAsString()));
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(DetailsOf(status).fields.empty());
  EXPECT_FALSE(DetailsOf(status).retry_delay.has_value());
}

TEST(StatusTest, ANegativeRetryDelayIsNone) {
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(-5);
  google::rpc::Status details;
  details.add_details()->PackFrom(retry);
  const absl::Status status =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::UNAVAILABLE, "", details.SerializeAsString()));
  EXPECT_EQ(DetailsOf(status).retry_delay, absl::ZeroDuration());
}

TEST(StatusTest, FieldErrorsOfThisSideReadLikeAServers) {
  const absl::Status status = FieldError(absl::StatusCode::kInvalidArgument, "x", "expected y");
  EXPECT_EQ(status.message(), "x: expected y");
  ASSERT_EQ(DetailsOf(status).fields.size(), 1);
  EXPECT_EQ(DetailsOf(status).fields[0].field, "x");
}

}  // namespace
}  // namespace certiq
