// Contents of a call and its result, and requests that are rejected before or early in it.
#include <atomic>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "certiq/client.h"
#include "certiq/status.h"
#include "fake_server.h"
#include "gtest/gtest.h"
#include "regex_match.h"
#include "test_client.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Answering;
using testing::Contains;
using testing::FakeServer;
using testing::FieldStatus;
using testing::Layer;
using testing::MakeLayer;
using testing::MakeTensor;
using testing::Matches;
using testing::ReceiveAll;
using testing::ServerStream;
using testing::TestClient;
using testing::Upload;

TEST(ClientTest, SendsEverythingAndReturnsTheResult) {
  Upload upload;
  FakeServer server([&upload](int, grpc::ServerContext*, ServerStream* stream) {
    upload = ReceiveAll(stream);
    for (const auto& frame : GoodAnswer(upload)) stream->Write(frame);
    return grpc::Status::OK;
  });
  const Layer layer = MakeLayer(10, 33, 50);
  QuantizeRequestData request = layer.Request();
  request.x_quantized = layer.x_quantized.View();
  request.spec.set_bits(3);
  request.held_out_fraction = 0.25;
  request.sequence_rows = 5;
  // Weights: 132 bytes a row, 3 in a chunk. Activations: 66 + 132 bytes a row, 2 in a chunk.
  const TestClient client(server.address(), {.chunk_bytes = 400});
  std::vector<ProgressEvent> events;
  const auto result = client->Quantize(
      request, {.progress = [&events](const ProgressEvent& event) { events.push_back(event); }});
  ASSERT_TRUE(result.ok()) << result.status();

  EXPECT_EQ(upload.error, "");
  EXPECT_EQ(upload.order, "h" + std::string(4, 'w') + std::string(25, 'a'));
  EXPECT_EQ(upload.weight, layer.weight.data);
  EXPECT_EQ(upload.x, layer.x.data);
  EXPECT_EQ(upload.x_quantized, layer.x_quantized.data);
  EXPECT_EQ(upload.header.layer_name(), "l.weight");
  EXPECT_EQ(upload.header.request_id(), "request");
  EXPECT_EQ(upload.header.spec().bits(), 3);
  EXPECT_EQ(upload.header.held_out_fraction(), 0.25);
  EXPECT_EQ(upload.header.sequence_rows(), 5);
  EXPECT_EQ(upload.header.x_quantized().dtype(), v1::DATA_TYPE_F32);

  ASSERT_EQ(result->tensors.size(), 2);
  EXPECT_EQ(result->tensors[0].name, "weight");
  EXPECT_EQ(result->tensors[0].data, layer.weight.data);
  EXPECT_EQ(result->tensors[1].shape, (std::vector<int64_t>{10, 1}));
  // Two frames, merged.
  EXPECT_EQ(std::vector<double>(result->certificate.row_bound().begin(),
                                result->certificate.row_bound().end()),
            (std::vector<double>{1, 1, 1, 1, 1, 2, 2, 2, 2, 2}));
  EXPECT_EQ(result->certificate.tokens(), 50);

  std::vector<v1::Phase> phases;
  int64_t uploaded = 0;
  for (const ProgressEvent& event : events) {
    if (const auto* progress = std::get_if<v1::Progress>(&event))
      phases.push_back(progress->phase());
    if (const auto* sent = std::get_if<UploadProgress>(&event)) {
      EXPECT_GE(sent->bytes, uploaded);
      uploaded = sent->bytes;
    }
  }
  EXPECT_EQ(phases, (std::vector<v1::Phase>{v1::PHASE_FACTOR, v1::PHASE_ROUND}));
  EXPECT_EQ(uploaded, 10 * 132 + 50 * 198);
}

TEST(ClientTest, UnsetFieldsStayUnset) {
  Upload upload;
  FakeServer server([&upload](int, grpc::ServerContext*, ServerStream* stream) {
    upload = ReceiveAll(stream);
    for (const auto& frame : GoodAnswer(upload)) stream->Write(frame);
    return grpc::Status::OK;
  });
  const Layer layer = MakeLayer(1, 1, 1);
  ASSERT_TRUE(TestClient(server.address())->Quantize(layer.Request()).ok());
  EXPECT_EQ(upload.header.spec().ByteSizeLong(), 0);
  EXPECT_FALSE(upload.header.has_held_out_fraction());
  EXPECT_FALSE(upload.header.has_x_quantized());
  EXPECT_EQ(upload.order, "hwa");
}

TEST(ClientTest, MessagesStayNearTwoMebibytesAndALargerRowTravelsAlone) {
  Upload upload;
  FakeServer server([&upload](int, grpc::ServerContext*, ServerStream* stream) {
    upload = ReceiveAll(stream);
    return FieldStatus("spec", "enough seen");
  });
  const TestClient client(server.address());
  const Layer small = MakeLayer(1000, 1000, 3000);  // Rows of 4000 and 2000 bytes.
  EXPECT_FALSE(client->Quantize(small.Request()).ok());
  EXPECT_EQ(upload.order, "hwwaaa");
  EXPECT_LE(upload.largest_message, (2U << 20) + 100);
  EXPECT_EQ(upload.x, small.x.data);

  const Layer wide = MakeLayer(2, 600'000, 2);  // Rows of 2.4 and 1.2 MB.
  EXPECT_FALSE(client->Quantize(wide.Request()).ok());
  EXPECT_EQ(upload.order, "hwwaa");
  EXPECT_EQ(upload.weight, wide.weight.data);
}

TEST(ClientTest, ACalibrationNeedsNoActivations) {
  Upload upload;
  FakeServer server([&upload](int, grpc::ServerContext*, ServerStream* stream) {
    upload = ReceiveAll(stream);
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no calibration c1");
  });
  const Layer layer = MakeLayer(2, 2, 1);
  QuantizeRequestData request = layer.Request();
  request.x.reset();
  request.calibration_id = "c1";
  EXPECT_TRUE(absl::IsNotFound(TestClient(server.address())->Quantize(request).status()));
  EXPECT_EQ(upload.order, "hw");
  EXPECT_EQ(upload.header.calibration_id(), "c1");
}

TEST(ClientTest, RejectsWhatDoesNotFitBeforeSending) {
  FakeServer server(Answering());
  const TestClient client(server.address());
  const Layer layer = MakeLayer(4, 8, 5);
  const OwnedTensor narrow = MakeTensor("narrow", v1::DATA_TYPE_F16, {5, 7});
  const OwnedTensor flat = MakeTensor("flat", v1::DATA_TYPE_F32, {8});
  const OwnedTensor integers = MakeTensor("integers", v1::DATA_TYPE_I32, {4, 8});
  const OwnedTensor empty = MakeTensor("empty", v1::DATA_TYPE_F32, {0, 8});
  const OwnedTensor wide = MakeTensor("wide", v1::DATA_TYPE_F64, {1, 2'100'000});
  const auto error = [&](const auto& change) {
    QuantizeRequestData request = layer.Request();
    change(request);
    const absl::Status status = client->Quantize(request).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  EXPECT_TRUE(Matches(error([&](auto& r) { r.x = narrow.View(); }),
                      ".*x.shape.*\"l.weight\" F32 \\[4, 8\\].*\"narrow\" F16 \\[5, 7\\].*"));
  EXPECT_TRUE(Matches(error([&](auto& r) { r.x_quantized = narrow.View(); }),
                      ".*x_quantized.shape.*\"l.x\" F16 \\[5, 8\\].*\"narrow\".*"));
  EXPECT_TRUE(Contains(error([&](auto& r) { r.weight = flat.View(); }), "weight.shape"));
  EXPECT_TRUE(Contains(error([&](auto& r) { r.weight = empty.View(); }), "weight.shape"));
  EXPECT_TRUE(Contains(error([&](auto& r) { r.x = flat.View(); }), "x.shape"));
  EXPECT_TRUE(Contains(error([&](auto& r) { r.weight = integers.View(); }), "weight.dtype"));
  EXPECT_TRUE(Contains(error([&](auto& r) { r.weight = wide.View(); }), "rows of at most"));
  EXPECT_TRUE(Contains(error([&](auto& r) { r.weight.data.remove_suffix(1); }), "127"));
  EXPECT_TRUE(Contains(error([&](auto& r) { r.x.reset(); }), "calibration_id"));
  EXPECT_TRUE(Contains(error([&](auto& r) {
                         r.x_quantized = r.x;
                         r.x.reset();
                       }),
                       "x_quantized"));
  EXPECT_EQ(server.calls(), 0);
}

TEST(ClientTest, IntegerActivationsAreFine) {
  FakeServer server(Answering());
  const Layer layer = MakeLayer(4, 8, 5);
  const OwnedTensor integers = MakeTensor("integers", v1::DATA_TYPE_U8, {5, 8});
  QuantizeRequestData request = layer.Request();
  request.x = integers.View();
  EXPECT_TRUE(TestClient(server.address())->Quantize(request).ok());
}

TEST(ClientTest, AnEarlyRejectionStopsTheUploadAndItsStatusWins) {
  FakeServer server([](int, grpc::ServerContext*, ServerStream* stream) {
    v1::QuantizeRequest header;
    stream->Read(&header);
    return FieldStatus("spec.bits", "expected 2 to 8, got 9");
  });
  // 40 MB: far more than the windows and buffers between the two hold.
  const Layer layer = MakeLayer(1, 1000, 20'000);
  int64_t uploaded = 0;
  const TestClient client(server.address());
  const absl::Status status =
      client
          ->Quantize(layer.Request(), {.progress =
                                           [&uploaded](const ProgressEvent& event) {
                                             uploaded = std::get<UploadProgress>(event).bytes;
                                           }})
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "spec.bits: expected 2 to 8, got 9");
  ASSERT_EQ(DetailsOf(status).fields.size(), 1);
  EXPECT_EQ(DetailsOf(status).fields[0].field, "spec.bits");
  EXPECT_LT(uploaded, 40'000'000);
  EXPECT_EQ(server.calls(), 1);
}

TEST(ClientTest, CallsOfSeveralThreadsShareAClient) {
  FakeServer server(Answering());
  const TestClient client(server.address());
  std::atomic<int> good{0};
  {
    std::vector<std::jthread> threads;
    threads.reserve(4);
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&client, &good, i] {
        const Layer layer = MakeLayer(4 + i, 8, 5);
        const auto result = client->Quantize(layer.Request());
        if (result.ok() && result->tensors[0].data == layer.weight.data) ++good;
      });
    }
  }
  EXPECT_EQ(good, 4);
}

TEST(ClientCreateTest, RejectsWhatItCannotDo) {
  for (const char* address : {"", "host", "host:", ":1", "host:0", "host:65536", "host:http",
                              "::1:50", "[::1]", "dns:///h:1", "a b:1", "host:1:2", "host:-1"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(Client::Create({.address = address}).status())) << address;
  }
  for (const char* address : {"localhost:50051", "10.0.0.1:1", "[::1]:50051", "a.b-c.d:65535"}) {
    EXPECT_TRUE(Client::Create({.address = address}).ok()) << address;
  }
  EXPECT_TRUE(
      absl::IsInvalidArgument(Client::Create({.address = "h:1", .chunk_bytes = 0}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      Client::Create({.address = "h:1", .retry = {.max_attempts = 0}}).status()));
}

}  // namespace
}  // namespace certiq
