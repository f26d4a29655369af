// Calls that break the contract or come at the wrong time. After each the server holds nothing and
// serves on; ~TestServer and the fixture see to it.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "support/requests.h"
#include "support/text.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

using grpc::StatusCode;

class QuantizeErrorsTest : public ::testing::Test {
 protected:
  ~QuantizeErrorsTest() override {
    EXPECT_TRUE(Quantize(server_, QuantizeRequestsFor(layer_)).status.ok());
    EXPECT_EQ(server_.budget.reserved(), 0);
  }

  void ExpectRefused(const std::vector<v1::QuantizeRequest>& requests, const char* field,
                     const char* text, StatusCode code = StatusCode::INVALID_ARGUMENT) {
    const Outcome outcome = Quantize(server_, requests);
    EXPECT_EQ(outcome.status.error_code(), code) << outcome.status.error_message();
    EXPECT_EQ(DetailsOf(outcome.status).field(), field);
    EXPECT_CONTAINS(outcome.status.error_message(), text);
    EXPECT_EQ(server_.budget.reserved(), 0);
  }

  TestServer server_;
  const Layer layer_ = MakeRandomLayer(8, 16, 40);
};

TEST_F(QuantizeErrorsTest, NoMessage) {
  ExpectRefused({}, "header", "expected as the first message, the stream ended without one");
}

TEST_F(QuantizeErrorsTest, HeaderMissing) {
  ExpectRefused({WeightChunk(layer_, 0, 8)}, "header", "expected as the first message, got weight");
  ExpectRefused({v1::QuantizeRequest()}, "header", "got none");
}

TEST_F(QuantizeErrorsTest, HeaderTwice) {
  ExpectRefused({HeaderFor(layer_), HeaderFor(layer_)}, "header",
                "expected as the first message, and only there");
}

TEST_F(QuantizeErrorsTest, EmptyMessage) {
  ExpectRefused({HeaderFor(layer_), v1::QuantizeRequest()}, "payload", "got none");
}

TEST_F(QuantizeErrorsTest, HeaderThatMakesNoSense) {
  v1::QuantizeRequest header = HeaderFor(layer_);
  header.mutable_header()->mutable_spec()->set_bits(9);
  ExpectRefused({header}, "spec.bits", "got 9");
  header = HeaderFor(layer_);
  header.mutable_header()->mutable_x()->set_shape(1, 17);
  ExpectRefused({header}, "x.shape", "17");
  header = HeaderFor(layer_);
  header.mutable_header()->mutable_weight()->set_shape(0, INT64_MAX);
  ExpectRefused({header}, "weight.shape", "expected 1 to");
}

TEST_F(QuantizeErrorsTest, PolishOfWhatIsToStayUnbiased) {
  v1::QuantizeRequest header = HeaderFor(layer_);
  header.mutable_header()->mutable_spec()->set_polish(2);
  header.mutable_header()->mutable_spec()->set_rounding(v1::ROUNDING_STOCHASTIC);
  ExpectRefused({header}, "spec.polish", "unbiased");
}

TEST_F(QuantizeErrorsTest, ChunkBeyondTheShape) {
  ExpectRefused({HeaderFor(layer_), WeightChunk(MakeRandomLayer(9, 16, 1), 0, 9)}, "weight.data",
                "got 9");
}

TEST_F(QuantizeErrorsTest, WrongOffset) {
  ExpectRefused({HeaderFor(layer_), WeightChunk(layer_, 0, 2), WeightChunk(layer_, 3, 4)},
                "weight.row_offset", "expected 2");
}

TEST_F(QuantizeErrorsTest, SecondSetOfActivationsUnannounced) {
  v1::QuantizeRequest chunk = ActivationChunk(layer_, 0, 40);
  chunk.mutable_activation()->set_x_quantized("1234");
  ExpectRefused({HeaderFor(layer_), chunk}, "activation.x_quantized", "got 4 bytes");
}

TEST_F(QuantizeErrorsTest, SecondSetOfActivationsMustMatchTheFirst) {
  v1::QuantizeRequest header = HeaderFor(layer_);
  *header.mutable_header()->mutable_x_quantized() = header.header().x();
  v1::QuantizeRequest chunk = ActivationChunk(layer_, 0, 40);
  ExpectRefused({header, chunk}, "activation.x_quantized", "got 0 bytes");
  chunk.mutable_activation()->set_x_quantized(chunk.activation().x().substr(64));
  ExpectRefused({header, chunk}, "activation.x_quantized", "expected the 40 rows of x");
  header.mutable_header()->mutable_x_quantized()->set_shape(0, 39);
  ExpectRefused({header}, "x_quantized.shape", "got [39, 16]");
}

TEST_F(QuantizeErrorsTest, HalfClosedEarly) {
  ExpectRefused({HeaderFor(layer_)}, "weight", "expected 8 rows, got 0 when the stream ended");
  ExpectRefused({HeaderFor(layer_), WeightChunk(layer_, 0, 8), ActivationChunk(layer_, 0, 39)}, "x",
                "expected 40 rows, got 39");
}

TEST_F(QuantizeErrorsTest, NotANumberIsRefusedWithItsPosition) {
  Layer layer = layer_;
  layer.x[33 * 16 + 5] = std::nanf("");
  ExpectRefused(QuantizeRequestsFor(layer, 10), "activation.x", "row 33, column 5");
}

TEST_F(QuantizeErrorsTest, AllActivationsZero) {
  Layer layer = layer_;
  std::fill(layer.x.begin(), layer.x.end(), 0.0F);
  const Outcome outcome = Quantize(server_, QuantizeRequestsFor(layer));
  EXPECT_EQ(outcome.status.error_code(), StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(DetailsOf(outcome.status).precondition.violations_size(), 1);
}

TEST_F(QuantizeErrorsTest, ErrorEndsTheUpload) {
  // The client keeps sending; it is told in the middle of it.
  Call call(server_);
  call.Send(HeaderFor(layer_));
  const v1::QuantizeRequest wrong = WeightChunk(layer_, 7, 8);
  EXPECT_TRUE(TestServer::Eventually([&] { return !call.Send(wrong); }));
  EXPECT_EQ(call.Finish().status.error_code(), StatusCode::INVALID_ARGUMENT);
}

TEST_F(QuantizeErrorsTest, MessageOver16Mebibytes) {
  v1::QuantizeRequest chunk;
  chunk.mutable_weight()->set_data(std::string((size_t{16} << 20) + 1, '\0'));
  for (const bool first : {true, false}) {
    std::vector<v1::QuantizeRequest> requests = {chunk};
    if (!first) requests.insert(requests.begin(), HeaderFor(layer_));
    const Outcome outcome = Quantize(server_, requests);
    EXPECT_EQ(outcome.status.error_code(), StatusCode::RESOURCE_EXHAUSTED)
        << outcome.status.error_message();
    EXPECT_TRUE(server_.Idle());
  }
}

TEST_F(QuantizeErrorsTest, LargeMessageWithinTheLimit) {
  // 15 MiB of activations in one message.
  const Layer layer = MakeRandomLayer(8, 256, 15360);
  EXPECT_TRUE(Quantize(server_, QuantizeRequestsFor(layer, layer.tokens)).status.ok());
}

constexpr char kQuantize[] = "QuantizationService/Quantize";

TEST_F(QuantizeErrorsTest, BytesThatAreNoMessage) {
  const std::string garbage = "\xff\xff\xff\xff";
  grpc::Status status = SendRaw(server_, kQuantize, {garbage});
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << status.error_message();
  EXPECT_EQ(DetailsOf(status).field(), "payload");
  // Also after everything has arrived, when the end of the stream would be taken for success.
  std::vector<std::string> messages;
  for (const auto& request : QuantizeRequestsFor(layer_)) {
    messages.push_back(request.SerializeAsString());
  }
  EXPECT_TRUE(SendRaw(server_, kQuantize, messages).ok());
  messages.push_back(garbage);
  status = SendRaw(server_, kQuantize, messages);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << status.error_message();
  EXPECT_CONTAINS(status.error_message(), "4 bytes");
}

TEST_F(QuantizeErrorsTest, NamesThatAreNotUtf8) {
  std::string header = HeaderFor(layer_).SerializeAsString();
  const size_t name = header.find("model");
  ASSERT_NE(name, std::string::npos);
  header[name] = '\xc0';
  const grpc::Status status = SendRaw(server_, kQuantize, {header});
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
}

TEST_F(QuantizeErrorsTest, CompressedMessagesAreRefused) {
  const grpc::Status status =
      SendRaw(server_, kQuantize, {HeaderFor(layer_).SerializeAsString() + std::string(64, '\0')},
              GRPC_COMPRESS_GZIP);
  EXPECT_EQ(status.error_code(), StatusCode::UNIMPLEMENTED) << status.error_message();
}

TEST(QuantizeLimitsTest, QueueFull) {
  TestServer server({.workers = 2, .queue_limit = 1});
  const Layer layer = MakeRandomLayer(8, 16, 32);
  Call first(server);
  first.Send(HeaderFor(layer));
  ASSERT_TRUE(first.ReadUntil(v1::PHASE_RECEIVE));
  const Outcome refused = Quantize(server, QuantizeRequestsFor(layer));
  EXPECT_EQ(refused.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(DetailsOf(refused.status).retry.retry_delay().seconds(), 1);
  // The one that was admitted is not affected.
  first.Send(WeightChunk(layer, 0, 8));
  first.Send(ActivationChunk(layer, 0, 32));
  EXPECT_TRUE(first.Finish().status.ok());
  EXPECT_EQ(server.Metric(R"(certiq_rejected_total{reason="queue_full"})"), 1);
}

TEST(QuantizeLimitsTest, OverBudget) {
  const Layer layer = MakeRandomLayer(8, 16, 32);
  // The peak is reserved whole at the header.
  int64_t bytes = 0;
  {
    TestServer server;
    Call call(server);
    call.Send(HeaderFor(layer));
    ASSERT_TRUE(call.ReadUntil(v1::PHASE_RECEIVE));
    bytes = server.budget.reserved();
    call.Cancel();
    call.Finish();
  }
  {
    TestServer server({.budget = bytes});
    Call first(server);
    first.Send(HeaderFor(layer));
    ASSERT_TRUE(first.ReadUntil(v1::PHASE_RECEIVE));
    const Outcome refused = Quantize(server, QuantizeRequestsFor(layer));
    EXPECT_EQ(refused.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_EQ(DetailsOf(refused.status).retry.retry_delay().seconds(), 1);
    first.Cancel();
    first.Finish();
    ASSERT_TRUE(server.Idle());
    EXPECT_TRUE(Quantize(server, QuantizeRequestsFor(layer)).status.ok());
    EXPECT_EQ(server.Metric(R"(certiq_rejected_total{reason="over_budget"})"), 1);
  }
  TestServer server({.budget = bytes - 1});
  const Outcome never = Quantize(server, QuantizeRequestsFor(layer));
  EXPECT_EQ(never.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_FALSE(DetailsOf(never.status).retry.has_retry_delay());
}

}  // namespace
}  // namespace certiq::testing
