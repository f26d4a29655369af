// Calibrations: made once, found, listed, ended; sums in and out.
#include "certiq/calibration_client.h"

#include <string>
#include <vector>

#include "certiq/safetensors.h"
#include "certiq/statistics.h"
#include "fake_calibrations.h"
#include "fake_server.h"
#include "gtest/gtest.h"
#include "temporary_folder.h"
#include "test_client.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Contains;
using testing::FakeCalibrations;
using testing::FakeServer;
using testing::MakeTensor;
using testing::PatientClient;
using testing::TemporaryFolder;

class CalibrationClientTest : public ::testing::Test {
 protected:
  // The first call of the method does its work and says otherwise.
  void BreakFirst(const std::string& broken) {
    service_.on_unary = [broken](const std::string& method, int calls) -> FakeCalibrations::End {
      if (method != broken || calls > 1) return std::nullopt;
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "the answer was lost");
    };
  }

  FakeCalibrations service_;
  FakeServer server_{std::vector<grpc::Service*>{&service_}};
  PatientClient<CalibrationClient> client_{server_.address()};
};

TEST_F(CalibrationClientTest, ALostAnswerMakesNoSecondOne) {
  BreakFirst("create");
  v1::CreateCalibrationRequest request;
  request.set_features(4);
  const auto calibration = client_->CreateCalibration(request);
  ASSERT_TRUE(calibration.ok()) << calibration.status();
  EXPECT_EQ(calibration->id(), "c1");
  EXPECT_EQ(service_.calls["create"], 2);
  EXPECT_EQ(service_.calibrations.size(), 1);
  // Another call is another calibration.
  EXPECT_EQ(client_->CreateCalibration(request)->id(), "c2");
  request.set_request_id("mine");
  EXPECT_EQ(client_->CreateCalibration(request)->id(), "c3");
  EXPECT_EQ(client_->CreateCalibration(request)->id(), "c3");
}

TEST_F(CalibrationClientTest, ListsAllPages) {
  for (int i = 0; i < 5; ++i) service_.Add();
  for (const int32_t page_size : {0, 1, 4, 5, 100}) {
    const auto all = client_->List({.page_size = page_size});
    ASSERT_TRUE(all.ok()) << all.status();
    ASSERT_EQ(all->size(), 5);
    EXPECT_EQ(all->back().id(), "c5");
  }
}

TEST_F(CalibrationClientTest, FindsByIdThenByLabel) {
  service_.Add(v1::CALIBRATION_STATE_OPEN, {"a"});
  service_.Add(v1::CALIBRATION_STATE_OPEN, {"two words", "both"});
  service_.Add(v1::CALIBRATION_STATE_OPEN, {"both", "c1"})->add_streams()->set_stream_id("0");
  EXPECT_EQ(client_->Find("c1")->id(), "c1");
  EXPECT_EQ(client_->Find("a")->id(), "c1");
  EXPECT_EQ(client_->Find("two words")->id(), "c2");
  EXPECT_EQ(client_->Find("c3")->streams_size(), 1);
  const absl::Status several = client_->Find("both").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(several)) << several;
  EXPECT_TRUE(Contains(several.message(), "c2, c3"));
  EXPECT_TRUE(absl::IsNotFound(client_->Find("none").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(client_->Find("").status()));
}

TEST_F(CalibrationClientTest, FinalizeSaysWhatIsExpected) {
  service_.Add();
  const auto calibration = client_->Finalize(
      {.calibration_id = "c1", .expected_tokens = 9, .expected_stream_ids = {"0", "1"}});
  ASSERT_TRUE(calibration.ok());
  EXPECT_EQ(calibration->state(), v1::CALIBRATION_STATE_FINALIZED);
  EXPECT_EQ(service_.finalized.expected_tokens(), 9);
  EXPECT_EQ(service_.finalized.expected_stream_ids_size(), 2);
  ASSERT_TRUE(client_->Finalize({.calibration_id = "c1"}).ok());
  EXPECT_FALSE(service_.finalized.has_expected_tokens());
}

TEST_F(CalibrationClientTest, Deletes) {
  service_.Add();
  EXPECT_TRUE(client_->Delete("c1").ok());
  EXPECT_TRUE(absl::IsNotFound(client_->Delete("c1")));
}

TEST_F(CalibrationClientTest, ImportsOnceHoweverOftenItIsTried) {
  service_.Add();
  BreakFirst("import");
  const OwnedTensor gram = MakeTensor("g", v1::DATA_TYPE_F32, {6});
  const OwnedTensor quantized = MakeTensor("q", v1::DATA_TYPE_F32, {6});
  const OwnedTensor cross = MakeTensor("c", v1::DATA_TYPE_F32, {3, 3});
  StatisticsView view{.tokens = 7, .portion = v1::PORTION_HELD_OUT, .gram = gram.View()};
  view.gram_quantized = quantized.View();
  view.cross = cross.View();
  // Pieces of two elements.
  const PatientClient<CalibrationClient> client(server_.address(), {.chunk_bytes = 9});
  const auto response = client->Import("c1", "s", view);
  ASSERT_TRUE(response.ok()) << response.status();
  EXPECT_TRUE(response->already_committed());
  EXPECT_EQ(service_.imported_bytes, gram.data + quantized.data + cross.data);
  EXPECT_EQ(service_.imported.tokens(), 7);
  EXPECT_EQ(service_.imported.portion(), v1::PORTION_HELD_OUT);
  EXPECT_EQ(service_.imported.layout(), v1::MATRIX_LAYOUT_UPPER);
  EXPECT_EQ(service_.imported.kind(), v1::CALIBRATION_KIND_MISMATCHED);
  EXPECT_EQ(service_.imported.features(), 3);
}

TEST_F(CalibrationClientTest, SumsThatDoNotFitAreRejectedBeforeTheyAreSent) {
  const OwnedTensor gram = MakeTensor("g", v1::DATA_TYPE_F64, {3, 3});
  const auto rejected = [&](const std::function<void(StatisticsView*)>& change) {
    StatisticsView view{.tokens = 1, .gram = gram.View()};
    change(&view);
    return absl::IsInvalidArgument(client_->Import("c1", "s", view).status());
  };
  const OwnedTensor five = MakeTensor("five", v1::DATA_TYPE_F64, {5});
  const OwnedTensor half = MakeTensor("half", v1::DATA_TYPE_F16, {3, 3});
  const OwnedTensor flat = MakeTensor("flat", v1::DATA_TYPE_F64, {6});
  EXPECT_TRUE(rejected([](StatisticsView* view) { view->tokens = 0; }));
  EXPECT_TRUE(rejected([&](StatisticsView* view) { view->gram = five.View(); }));
  EXPECT_TRUE(rejected([&](StatisticsView* view) { view->gram = half.View(); }));
  EXPECT_TRUE(rejected([](StatisticsView* view) { view->gram.data.remove_suffix(1); }));
  EXPECT_TRUE(rejected([&](StatisticsView* view) { view->cross = gram.View(); }));
  EXPECT_TRUE(rejected([&](StatisticsView* view) {
    view->gram_quantized = flat.View();
    view->cross = gram.View();
  }));
  EXPECT_EQ(service_.calls["import"], 0);
}

// An export of a mismatched calibration of two features, upper triangles.
std::vector<v1::ExportStatisticsResponse> Exported() {
  std::vector<v1::ExportStatisticsResponse> frames(3);
  v1::StatisticsHeader* const header = frames[0].mutable_header();
  header->set_tokens(11);
  header->set_portion(v1::PORTION_FIT);
  header->set_dtype(v1::DATA_TYPE_F64);
  header->set_layout(v1::MATRIX_LAYOUT_UPPER);
  header->set_features(2);
  header->set_kind(v1::CALIBRATION_KIND_MISMATCHED);
  // 24, 24 and 32 bytes, cut anywhere.
  frames[1].set_data(std::string(24, 'g') + std::string(8, 'q'));
  frames[2].set_data(std::string(16, 'q') + std::string(32, 'c'));
  return frames;
}

TEST_F(CalibrationClientTest, ExportsAndReadsBack) {
  service_.Wait();
  service_.exported = Exported();
  BreakFirst("export");
  const auto statistics = client_->Export("c1");
  ASSERT_TRUE(statistics.ok()) << statistics.status();
  EXPECT_EQ(statistics->tokens, 11);
  EXPECT_EQ(statistics->gram.data, std::string(24, 'g'));
  EXPECT_EQ(statistics->gram_quantized->data, std::string(24, 'q'));
  EXPECT_EQ(statistics->cross->shape, (std::vector<int64_t>{2, 2}));

  const TemporaryFolder folder;
  auto staged = StageStatistics(folder.Path("f"), statistics->View());
  ASSERT_TRUE(staged.ok()) << staged.status();
  ASSERT_TRUE(staged->Commit().ok());
  const auto file = SafetensorsFile::Open(folder.Path("f"));
  const auto metadata = ReadStatisticsMetadata(*file);
  ASSERT_TRUE(metadata.ok());
  EXPECT_EQ(metadata->tokens, 11);
  EXPECT_EQ(metadata->portion, v1::PORTION_FIT);
  EXPECT_TRUE(metadata->mismatched);
  const auto view = ReadStatistics(*file, {"gram", "gram_quantized", "cross"});
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(ShapeOf(*view)->layout, v1::MATRIX_LAYOUT_UPPER);
  EXPECT_EQ(view->cross->data, statistics->cross->data);
}

TEST_F(CalibrationClientTest, BrokenExportsAreRejected) {
  const auto code =
      [&](const std::function<void(std::vector<v1::ExportStatisticsResponse>*)>& change) {
        service_.Wait();
        service_.exported = Exported();
        change(&service_.exported);
        return client_->Export("c1").status().code();
      };
  using Frames = std::vector<v1::ExportStatisticsResponse>;
  EXPECT_EQ(code([](Frames* f) { f->pop_back(); }), absl::StatusCode::kDataLoss);
  EXPECT_EQ(code([](Frames* f) { f->clear(); }), absl::StatusCode::kDataLoss);
  EXPECT_EQ(code([](Frames* f) { f->erase(f->begin()); }), absl::StatusCode::kInternal);
  EXPECT_EQ(code([](Frames* f) { f->push_back(f->back()); }), absl::StatusCode::kInternal);
  EXPECT_EQ(code([](Frames* f) { f->push_back(f->front()); }), absl::StatusCode::kInternal);
  EXPECT_EQ(code([](Frames* f) { f->at(0).mutable_header()->set_features(1 << 30); }),
            absl::StatusCode::kInternal);
  EXPECT_EQ(code([](Frames* f) { f->at(0).mutable_header()->set_dtype(v1::DATA_TYPE_F32); }),
            absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace certiq
