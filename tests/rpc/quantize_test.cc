// Calls that succeed.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "base/sha256.h"
#include "support/requests.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

std::vector<float> Floats(const std::string& bytes) {
  std::vector<float> values(bytes.size() / 4);
  std::memcpy(values.data(), bytes.data(), values.size() * 4);
  return values;
}

// |X W^T - X Q^T| / |X W^T| from the raw data, in float64.
double RelativeError(const Layer& layer, const std::vector<float>& quantized) {
  double error = 0;
  double reference = 0;
  for (int64_t t = 0; t < layer.tokens; ++t) {
    for (int64_t r = 0; r < layer.rows; ++r) {
      double full = 0;
      double difference = 0;
      for (int64_t j = 0; j < layer.features; ++j) {
        const double x = layer.x[t * layer.features + j];
        const double w = layer.weights[r * layer.features + j];
        full += x * w;
        difference += x * (w - static_cast<double>(quantized[r * layer.features + j]));
      }
      error += difference * difference;
      reference += full * full;
    }
  }
  return std::sqrt(error / reference);
}

std::string Hex(std::span<const std::byte> bytes) {
  base::Sha256 digest;
  digest.Update(absl::string_view(static_cast<const char*>(static_cast<const void*>(bytes.data())),
                                  bytes.size()));
  return digest.Finish();
}

TEST(Sha256Test, KnownDigest) {
  base::Sha256 digest;
  digest.Update("a");
  digest.Update("bc");
  EXPECT_EQ(digest.Finish(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(QuantizeTest, SmallLayer) {
  TestServer server;
  const Layer layer = MakeRandomLayer(24, 48, 200);
  const Outcome outcome = Quantize(server, QuantizeRequestsFor(layer, 7));
  ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  const v1::Certificate& certificate = outcome.certificate;
  EXPECT_EQ(certificate.rows(), 24);
  EXPECT_EQ(certificate.features(), 48);
  EXPECT_EQ(certificate.tokens(), 200);
  EXPECT_EQ(certificate.row_error_size(), 24);
  EXPECT_EQ(certificate.outcome(), v1::OUTCOME_QUANTIZED);
  EXPECT_EQ(certificate.weights_sha256(), Hex(std::as_bytes(std::span(layer.weights))));
  EXPECT_EQ(certificate.x_sha256(), Hex(std::as_bytes(std::span(layer.x))));
  EXPECT_GT(certificate.phase_seconds().receive(), 0);
  ASSERT_EQ(outcome.header.tensors(0).name(), "weight");
  const std::vector<float> quantized = Floats(outcome.tensors.at(0));
  ASSERT_EQ(quantized.size(), layer.weights.size());
  EXPECT_NEAR(certificate.relative_error(), RelativeError(layer, quantized),
              1e-4 * certificate.relative_error());
  int64_t bytes = 0;
  for (const auto& [index, data] : outcome.tensors) bytes += static_cast<int64_t>(data.size());
  EXPECT_EQ(outcome.header.total_bytes(), bytes);
  EXPECT_EQ(server.budget.reserved(), 0);
}

// Frames hold whole rows, in order, and at most 1 MiB unless one row is larger.
TEST(QuantizeTest, FramesAddUpToTheTensors) {
  TestServer server;
  for (const auto& [rows, features, format] :
       {std::tuple(int64_t{700}, int64_t{1000}, v1::FORMAT_DENSE_F32),
        std::tuple(int64_t{3}, int64_t{8}, v1::FORMAT_DENSE_BF16),
        std::tuple(int64_t{4096}, int64_t{256}, v1::FORMAT_GPTQ)}) {
    std::vector<v1::QuantizeRequest> requests =
        QuantizeRequestsFor(MakeRandomLayer(rows, features, 64), 512);
    requests[0].mutable_header()->mutable_spec()->set_method(v1::METHOD_NEAREST);
    requests[0].mutable_header()->mutable_spec()->set_format(format);
    const Outcome outcome = Quantize(server, requests);
    ASSERT_TRUE(outcome.status.ok()) << outcome.status.error_message();
    std::map<int32_t, int64_t> next_row;
    int32_t tensor = 0;
    for (const ChunkFrame& chunk : outcome.chunks) {
      ASSERT_LT(chunk.tensor, outcome.header.tensors_size());
      EXPECT_GE(chunk.tensor, tensor);
      tensor = chunk.tensor;
      const v1::TensorHeader& header = outcome.header.tensors(chunk.tensor);
      const int64_t row_bytes =
          static_cast<int64_t>(outcome.tensors.at(chunk.tensor).size()) / header.shape(0);
      EXPECT_EQ(chunk.row_offset, next_row[chunk.tensor]);
      EXPECT_GT(chunk.bytes, 0);
      EXPECT_EQ(chunk.bytes % row_bytes, 0);
      EXPECT_LE(chunk.bytes, std::max<int64_t>(1 << 20, row_bytes));
      next_row[chunk.tensor] += chunk.bytes / row_bytes;
    }
    int64_t bytes = 0;
    for (int32_t t = 0; t < outcome.header.tensors_size(); ++t) {
      EXPECT_EQ(next_row[t], outcome.header.tensors(t).shape(0)) << t;
      bytes += static_cast<int64_t>(outcome.tensors.at(t).size());
    }
    EXPECT_EQ(outcome.header.total_bytes(), bytes);
    EXPECT_EQ(outcome.certificate.rows(), rows);
  }
}

TEST(QuantizeTest, PhasesComeInOrder) {
  TestServer server;
  const Outcome outcome = Quantize(server, QuantizeRequestsFor(MakeRandomLayer(24, 48, 200)));
  ASSERT_TRUE(outcome.status.ok());
  std::vector<v1::Phase> phases;
  for (const v1::Progress& progress : outcome.progress) {
    EXPECT_GE(progress.fraction(), 0);
    EXPECT_LE(progress.fraction(), 1);
    if (phases.empty() || phases.back() != progress.phase()) phases.push_back(progress.phase());
  }
  ASSERT_GE(phases.size(), 6);
  EXPECT_EQ(phases[0], v1::PHASE_RECEIVE);
  EXPECT_EQ(phases[1], v1::PHASE_QUEUE);
  EXPECT_EQ(phases[2], v1::PHASE_REFERENCE);
  EXPECT_EQ(phases[3], v1::PHASE_FACTOR);
  EXPECT_EQ(phases.back(), v1::PHASE_PACK);
}

TEST(QuantizeTest, AdmissionIsToldBeforeTheUpload) {
  TestServer server;
  const Layer layer = MakeRandomLayer(8, 16, 32);
  Call call(server);
  call.Send(HeaderFor(layer));
  EXPECT_TRUE(call.ReadUntil(v1::PHASE_RECEIVE));
  EXPECT_GT(server.budget.reserved(), 0);
  call.Send(ActivationChunk(layer, 0, 32));
  call.Send(WeightChunk(layer, 0, 8));
  EXPECT_TRUE(call.Finish().status.ok());
}

TEST(QuantizeTest, ChunksAndWorkersDoNotChangeTheResult) {
  const Layer layer = MakeRandomLayer(24, 48, 300);
  std::string expected;
  for (const int workers : {1, 2, 4}) {
    TestServer server({.workers = workers});
    for (const int64_t rows : {1, 13, 300}) {
      const Outcome outcome = Quantize(server, QuantizeRequestsFor(layer, rows));
      ASSERT_TRUE(outcome.status.ok());
      if (expected.empty()) expected = outcome.tensors.at(0);
      EXPECT_EQ(outcome.tensors.at(0), expected);
    }
  }
}

TEST(QuantizeTest, SlowReader) {
  TestServer server;
  // 16 MiB of result: far more than flow control lets through unread.
  const Layer layer = MakeRandomLayer(16384, 256, 64);
  Call call(server);
  call.SendAll(QuantizeRequestsFor(layer, 4096));
  call.Close();
  ASSERT_TRUE(TestServer::Eventually([&] {
    return server.Metric(R"(certiq_jobs_total{method="optq",outcome="succeeded"})") == 1;
  }));
  EXPECT_GE(server.budget.reserved(), int64_t{16} << 20);
  // Others are served meanwhile.
  EXPECT_TRUE(Quantize(server, QuantizeRequestsFor(MakeRandomLayer(8, 16, 32))).status.ok());
  const Outcome outcome = call.Finish();
  EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
  EXPECT_EQ(outcome.tensors.at(0).size(), layer.weights.size() * 4);
  EXPECT_EQ(outcome.certificate.row_bound_size(), 16384);
}

TEST(QuantizeTest, SlowWriter) {
  TestServer server;
  const Layer layer = MakeRandomLayer(8, 16, 32);
  Call call(server);
  for (const v1::QuantizeRequest& request : QuantizeRequestsFor(layer, 1)) {
    ASSERT_TRUE(call.Send(request));
    // One message at a time: each is folded before the next is sent.
    ASSERT_TRUE(call.ReadUntil(v1::PHASE_RECEIVE));
  }
  EXPECT_TRUE(call.Finish().status.ok());
}

TEST(QuantizeTest, ManyClients) {
  TestServer server({.queue_limit = 64});
  std::vector<std::thread> clients;
  for (uint32_t c = 0; c < 24; ++c) {
    clients.emplace_back([&server, c] {
      const Layer layer = MakeRandomLayer(16 + c, 32, 100, c);
      const Outcome outcome = Quantize(server, QuantizeRequestsFor(layer, 10));
      EXPECT_TRUE(outcome.status.ok()) << outcome.status.error_message();
      EXPECT_EQ(outcome.certificate.rows(), 16 + c);
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_TRUE(server.Idle());
}

TEST(QuantizeTest, UploadsGoOnWhileEveryWorkerHasAJob) {
  Gate gate;
  TestServer server({.workers = 1});
  server.Block(gate);
  const Layer layer = MakeRandomLayer(8, 16, 32);
  Call call(server);
  call.SendAll(QuantizeRequestsFor(layer, 4));
  call.Close();
  EXPECT_TRUE(TestServer::Eventually([&] { return server.pool.queue_depth() == 1; }));
  gate.Open();
  EXPECT_TRUE(call.Finish().status.ok());
}

}  // namespace
}  // namespace certiq::testing
