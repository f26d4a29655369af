#include "rpc/calls/result_stream.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

namespace certiq::server {
namespace {

engine::ResultTensor Tensor(const char* role, std::vector<int64_t> shape) {
  int64_t count = 1;
  for (const int64_t n : shape) count *= n;
  engine::ResultTensor tensor{role, engine::DType::kF32, std::move(shape), {}};
  tensor.bytes.resize(static_cast<size_t>(count) * 4);
  for (size_t i = 0; i < tensor.bytes.size(); ++i) tensor.bytes[i] = std::byte(i * 7);
  return tensor;
}

TEST(ResultStreamTest, FramesAddUpToTheTensors) {
  for (const int64_t frame_bytes : {1, 24, 50, 1 << 20}) {
    server::ByteBudget budget(1000);
    server::QuantizeResult result;
    result.reservation = *budget.TryReserve(500, "a result");
    result.queue_seconds = 3;
    result.layer.tensors = {Tensor("weight", {5, 6}), Tensor("g_idx", {6}),
                            Tensor("scales", {5, 1})};
    const auto tensors = result.layer.tensors;
    {
      ResultStream stream(std::move(result), CallFacts(), frame_bytes);
      v1::QuantizeResponse frame;
      ASSERT_TRUE(stream.Next(frame));
      ASSERT_TRUE(frame.has_result());
      EXPECT_EQ(frame.result().total_bytes(), 4 * (30 + 6 + 5));
      EXPECT_EQ(frame.result().tensors(0).name(), "weight");
      EXPECT_EQ(frame.result().tensors(1).shape_size(), 1);
      std::map<int, std::string> data;
      std::map<int, int64_t> rows;
      while (stream.Next(frame) && frame.has_chunk()) {
        const auto& chunk = frame.chunk();
        const auto row_bytes = static_cast<int64_t>(tensors[chunk.tensor()].bytes.size()) /
                               tensors[chunk.tensor()].shape[0];
        EXPECT_EQ(chunk.row_offset(), rows[chunk.tensor()]);
        ASSERT_EQ(static_cast<int64_t>(chunk.data().size()) % row_bytes, 0);
        EXPECT_LE(static_cast<int64_t>(chunk.data().size()), std::max(frame_bytes, row_bytes));
        rows[chunk.tensor()] += static_cast<int64_t>(chunk.data().size()) / row_bytes;
        data[chunk.tensor()] += chunk.data();
      }
      for (size_t t = 0; t < tensors.size(); ++t) {
        ASSERT_EQ(data[static_cast<int>(t)].size(), tensors[t].bytes.size());
        EXPECT_TRUE(std::equal(tensors[t].bytes.begin(), tensors[t].bytes.end(),
                               data[static_cast<int>(t)].begin(),
                               [](std::byte a, char b) { return a == std::byte(b); }));
      }
      ASSERT_TRUE(frame.has_certificate());
      EXPECT_EQ(frame.certificate().phase_seconds().queue(), 3);
      EXPECT_FALSE(stream.Next(frame));
      EXPECT_EQ(budget.reserved(), 500);
    }
    EXPECT_EQ(budget.reserved(), 0);
  }
}

}  // namespace
}  // namespace certiq::server
