// The verbs of calibrations and jobs, in one process: arguments in, streams and exit code out.
#include <sstream>
#include <stop_token>
#include <string>
#include <vector>

#include "certiq/safetensors.h"
#include "command.h"
#include "fake_calibrations.h"
#include "fake_jobs.h"
#include "fake_server.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "temporary_folder.h"
#include "test_util.h"

namespace certiq::cli {
namespace {

using testing::Contains;
using testing::FakeCalibrations;
using testing::FakeJobs;
using testing::FakeServer;
using testing::MakeLayer;
using testing::MakeTensor;
using testing::ReadFile;
using testing::TemporaryFolder;

class ServiceVerbsTest : public ::testing::Test {
 protected:
  ServiceVerbsTest() {
    EXPECT_TRUE(WriteSafetensors(folder_.Path("w"), {layer_.weight.View()}).ok());
    EXPECT_TRUE(
        WriteSafetensors(folder_.Path("a"), {layer_.x.View(), layer_.x_quantized.View()}).ok());
  }

  // With --server behind the verb.
  int Run(std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), {"--server", server_.address()});
    out_.str("");
    err_.str("");
    ClientOptions client;
    client.sleep = [](absl::Duration, const std::stop_token& stop) {
      return !stop.stop_requested();
    };
    return RunCommand(arguments, Io{.out = out_, .err = err_, .interrupt = {}, .client = client});
  }
  std::string Activations() const { return "--activations=" + folder_.Path("a"); }

  TemporaryFolder folder_;
  testing::Layer layer_ = MakeLayer(3, 4, 20);
  FakeCalibrations calibrations_;
  FakeJobs jobs_;
  FakeServer server_{std::vector<grpc::Service*>{&calibrations_, &jobs_}};
  std::ostringstream out_;
  std::ostringstream err_;
};

TEST_F(ServiceVerbsTest, CreatesEmptyAndFilledCalibrations) {
  ASSERT_EQ(Run({"calibrations", "create", "--features=4", "--kind=mismatched", "--label", "a",
                 "--label=b", "--held_out_fraction=0.25", "--ttl=90m"}),
            kExitOk)
      << err_.str();
  EXPECT_EQ(out_.str(), "c1\n");
  const v1::Calibration& made = calibrations_.calibrations[0];
  EXPECT_EQ(made.kind(), v1::CALIBRATION_KIND_MISMATCHED);
  EXPECT_EQ(made.labels_size(), 2);
  EXPECT_EQ(made.held_out_fraction(), 0.25);
  EXPECT_EQ(made.expire_time().seconds(), 5400);

  ASSERT_EQ(
      Run({"calibrations", "create", Activations(), "--x=l.x", "--x_quantized=l.x_quantized"}),
      kExitOk)
      << err_.str();
  EXPECT_EQ(out_.str(), "c2\n");
  EXPECT_EQ(calibrations_.calibrations[1].features(), 4);
  EXPECT_EQ(calibrations_.calibrations[1].kind(), v1::CALIBRATION_KIND_MISMATCHED);
  EXPECT_EQ(calibrations_.streams["0"].X(), layer_.x.data);
  EXPECT_EQ(calibrations_.streams["0"].XQuantized(), layer_.x_quantized.data);
}

TEST_F(ServiceVerbsTest, ACalibrationThatWasNotFilledIsNamed) {
  calibrations_.on_open = [](int, testing::FakeStream*) -> FakeCalibrations::End {
    return grpc::Status(grpc::StatusCode::ABORTED, "taken over");
  };
  EXPECT_EQ(Run({"calibrations", "create", Activations(), "--x=l.x"}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "calibration c1 was made but not filled"));
  EXPECT_TRUE(out_.str().empty());
}

TEST_F(ServiceVerbsTest, AddsFinalizesShowsAndDeletes) {
  calibrations_.Add(v1::CALIBRATION_STATE_OPEN, {"my label"});
  ASSERT_EQ(Run({"calibrations", "add", "my label", Activations(), "--x=l.x", "--stream=r0"}),
            kExitOk)
      << err_.str();
  EXPECT_EQ(out_.str(), "stream r0 of c1: 20 tokens\n");
  ASSERT_EQ(Run({"calibrations", "finalize", "c1", "--expected_tokens=20", "--expected_stream",
                 "r0", "--expected_stream=r1"}),
            kExitOk);
  EXPECT_TRUE(Contains(out_.str(), "state           FINALIZED\n"));
  EXPECT_EQ(calibrations_.finalized.expected_tokens(), 20);
  EXPECT_EQ(calibrations_.finalized.expected_stream_ids(1), "r1");
  ASSERT_EQ(Run({"calibrations", "get", "my label", "--json"}), kExitOk);
  EXPECT_EQ(nlohmann::json::parse(out_.str())["state"], "CALIBRATION_STATE_FINALIZED");
  ASSERT_EQ(Run({"calibrations", "list"}), kExitOk);
  EXPECT_TRUE(Contains(out_.str(), "c1  FINALIZED  N 4"));
  ASSERT_EQ(Run({"calibrations", "list", "--label=other", "--json"}), kExitOk);
  EXPECT_EQ(nlohmann::json::parse(out_.str())["calibrations"].size(), 0);
  ASSERT_EQ(Run({"calibrations", "delete", "my label"}), kExitOk);
  EXPECT_EQ(out_.str(), "deleted c1\n");
  EXPECT_EQ(Run({"calibrations", "get", "c1"}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "NOT_FOUND"));
  EXPECT_TRUE(Contains(err_.str(), "advice: `certiq calibrations list`"));
}

TEST_F(ServiceVerbsTest, ImportsWhatItExported) {
  calibrations_.Add();
  v1::ExportStatisticsResponse frame;
  frame.mutable_header()->set_tokens(5);
  frame.mutable_header()->set_portion(v1::PORTION_HELD_OUT);
  frame.mutable_header()->set_dtype(v1::DATA_TYPE_F64);
  frame.mutable_header()->set_layout(v1::MATRIX_LAYOUT_FULL);
  frame.mutable_header()->set_features(2);
  calibrations_.exported.push_back(frame);
  frame.set_data(std::string(32, 'g'));
  calibrations_.exported.push_back(frame);
  const std::string file = folder_.Path("s");
  ASSERT_EQ(Run({"export", "c1", "--output", file, "--portion=held_out", "--layout=full"}), kExitOk)
      << err_.str();
  EXPECT_TRUE(Contains(out_.str(), "sums of 5 tokens"));
  ASSERT_EQ(Run({"import", "c1", "--statistics", file, "--stream=s"}), kExitOk) << err_.str();
  EXPECT_EQ(calibrations_.imported.tokens(), 5);
  EXPECT_EQ(calibrations_.imported.portion(), v1::PORTION_HELD_OUT);
  EXPECT_EQ(calibrations_.imported_bytes, std::string(32, 'g'));
  ASSERT_EQ(Run({"import", "c1", "--statistics", file, "--stream=s"}), kExitOk);
  EXPECT_TRUE(Contains(out_.str(), "was there already"));
  EXPECT_EQ(Run({"import", "c1", "--statistics", file, "--stream=t", "--tokens=6"}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "--tokens: expected 5"));
}

TEST_F(ServiceVerbsTest, ImportsTensorsByName) {
  calibrations_.Add();
  const OwnedTensor gram = MakeTensor("g", v1::DATA_TYPE_F32, {2, 2});
  ASSERT_TRUE(WriteSafetensors(folder_.Path("s"), {gram.View()}).ok());
  const std::string file = "--statistics=" + folder_.Path("s");
  EXPECT_EQ(Run({"import", "c1", file, "--stream=s", "--gram=g"}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "--tokens"));
  EXPECT_EQ(Run({"import", "c1", file, "--stream=s", "--gram=g", "--tokens=9"}), kExitOk);
  EXPECT_EQ(calibrations_.imported.kind(), v1::CALIBRATION_KIND_MATCHED);
  EXPECT_EQ(Run({"import", "c1", file, "--stream=s", "--gram=g", "--cross=g"}), kExitUsage);
}

TEST_F(ServiceVerbsTest, SubmitsAndPrintsTheIdAlone) {
  calibrations_.Add(v1::CALIBRATION_STATE_FINALIZED, {"label"});
  ASSERT_EQ(Run({"submit", "--weights", folder_.Path("w"), "--weight=l.weight",
                 "--calibration=label", "--bits=3", "--priority=7", "--deadline=5m", "--ttl=24h",
                 "--request_id=mine", "--damping=held_out:0.01,0.1"}),
            kExitOk)
      << err_.str();
  EXPECT_EQ(out_.str(), "j1\n");
  const v1::CreateJobHeader& header = jobs_.created[0];
  EXPECT_EQ(header.calibration_id(), "c1");
  EXPECT_EQ(header.layer_name(), "l.weight");
  EXPECT_EQ(header.request_id(), "mine");
  EXPECT_EQ(header.priority(), 7);
  EXPECT_EQ(header.deadline().seconds(), 300);
  EXPECT_EQ(header.ttl().seconds(), 86'400);
  EXPECT_EQ(header.spec().bits(), 3);
  EXPECT_EQ(header.spec().damping().held_out().ladder_size(), 2);
  EXPECT_EQ(jobs_.weights, layer_.weight.data);
}

TEST_F(ServiceVerbsTest, AnOpenCalibrationIsNoneToQuantizeWith) {
  calibrations_.Add();
  for (const char* verb : {"submit", "quantize"}) {
    EXPECT_EQ(Run({verb, "--weights", folder_.Path("w"), "--weight=l.weight", "--calibration=c1"}),
              kExitFailed);
    EXPECT_TRUE(Contains(err_.str(), "FAILED_PRECONDITION: calibration c1 is still open"));
    EXPECT_TRUE(Contains(err_.str(), "certiq calibrations finalize c1"));
  }
  EXPECT_TRUE(jobs_.created.empty());
}

TEST_F(ServiceVerbsTest, WatchEndsWithTheJob) {
  jobs_.watches = {
      {{v1::JOB_STATE_QUEUED, v1::JOB_STATE_RUNNING, v1::JOB_STATE_SUCCEEDED}, grpc::Status::OK},
      {{v1::JOB_STATE_FAILED}, grpc::Status::OK},
      {{v1::JOB_STATE_CANCELLED}, grpc::Status::OK}};
  EXPECT_EQ(Run({"watch", "j1"}), kExitOk);
  EXPECT_EQ(out_.str(), "SUCCEEDED\n");
  EXPECT_TRUE(Contains(err_.str(), "queue\nround\n"));
  jobs_.job.mutable_error()->set_code(9);
  jobs_.job.mutable_error()->set_message("every damping attempt failed");
  EXPECT_EQ(Run({"watch", "j1"}), kExitFailed);
  EXPECT_EQ(out_.str(), "FAILED\n");
  EXPECT_TRUE(Contains(err_.str(), "FAILED_PRECONDITION: every damping attempt failed"));
  EXPECT_EQ(Run({"watch", "j1"}), kExitFailed);
  EXPECT_EQ(out_.str(), "CANCELLED\n");
}

TEST_F(ServiceVerbsTest, ResultWritesWhatQuantizeWould) {
  ASSERT_EQ(Run({"result", "j1", "--output", folder_.Path("o"), "--report", folder_.Path("r")}),
            kExitOk)
      << err_.str();
  const auto output = SafetensorsFile::Open(folder_.Path("o"));
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_TRUE(output->Tensor("l.weight").ok());
  EXPECT_TRUE(output->Tensor("l.scales").ok());
  EXPECT_EQ(nlohmann::json::parse(ReadFile(folder_.Path("r")))["calibration_id"], "c1");
  EXPECT_TRUE(Contains(out_.str(), "l.weight [3, 4]\n"));
  EXPECT_TRUE(Contains(out_.str(), "calibration     c1\n"));
}

TEST_F(ServiceVerbsTest, ResultDoesNotWait) {
  jobs_.job.set_state(v1::JOB_STATE_RUNNING);
  EXPECT_EQ(Run({"result", "j1", "--output", folder_.Path("o")}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "FAILED_PRECONDITION: the job has not ended"));
  EXPECT_TRUE(Contains(err_.str(), "advice: `certiq watch`"));
  jobs_.job.set_state(v1::JOB_STATE_FAILED);
  EXPECT_EQ(Run({"result", "j1"}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "`certiq jobs get`"));
  EXPECT_EQ(folder_.Names(), testing::Names({"w", "a"}));
}

TEST_F(ServiceVerbsTest, JobsAreListedShownCancelledAndDeleted) {
  jobs_.pages.resize(1);
  *jobs_.pages[0].add_jobs() = jobs_.job;
  ASSERT_EQ(Run({"jobs", "list", "--state=queued", "--state", "succeeded", "--calibration=c1"}),
            kExitOk);
  EXPECT_TRUE(Contains(out_.str(), "j1  SUCCEEDED"));
  EXPECT_EQ(jobs_.listed[0].states_size(), 2);
  EXPECT_EQ(jobs_.listed[0].calibration_id(), "c1");
  ASSERT_EQ(Run({"jobs", "list", "--json"}), kExitOk);
  EXPECT_EQ(nlohmann::json::parse(out_.str())["jobs"][0]["id"], "j1");
  ASSERT_EQ(Run({"jobs", "get", "j1"}), kExitOk);
  EXPECT_TRUE(Contains(out_.str(), "layer           l.weight [3, 4]\n"));
  ASSERT_EQ(Run({"jobs", "get", "j1", "--json"}), kExitOk);
  EXPECT_EQ(nlohmann::json::parse(out_.str())["state"], "JOB_STATE_SUCCEEDED");
  ASSERT_EQ(Run({"cancel", "j1"}), kExitOk);
  EXPECT_EQ(out_.str(), "SUCCEEDED\n");
  EXPECT_EQ(Run({"jobs", "delete", "j1"}), kExitOk);
  jobs_.job.set_state(v1::JOB_STATE_RUNNING);
  EXPECT_EQ(Run({"jobs", "delete", "j1"}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "`certiq cancel`"));
  EXPECT_EQ(Run({"jobs", "get", "j9"}), kExitFailed);
}

TEST_F(ServiceVerbsTest, UsageErrorsAreTwo) {
  using Arguments = std::vector<std::string>;
  const std::string x = "--x=l.x";
  for (const Arguments& bad :
       {Arguments{"calibrations"},
        {"calibrations", "make"},
        {"calibrations", "create"},
        {"calibrations", "create", "--features=4", Activations(), x},
        {"calibrations", "create", "--features=four"},
        {"calibrations", "create", Activations()},
        {"calibrations", "create", "--features=4", "--stream=s"},
        {"calibrations", "create", Activations(), x, "--kind=mismatched"},
        {"calibrations", "create", "--features=4", "--ttl=24"},
        {"calibrations", "create", "--features=4", "--ttl=-5m"},
        {"calibrations", "create", "--features=4", "--ttl=inf"},
        {"calibrations", "add", "c1", Activations(), x},
        {"calibrations", "add", Activations(), x, "--stream=s"},
        {"calibrations", "get"},
        {"calibrations", "get", "c1", "c2"},
        {"calibrations", "finalize", "c1", "--expected_tokens=some"},
        {"calibrations", "list", "--state=queued"},
        {"jobs"},
        {"jobs", "list", "--state=idle"},
        {"jobs", "get"},
        {"watch"},
        {"cancel"},
        {"cancel", "j1", "--json"},
        {"result"},
        {"result", "j1", "--output=o", "--report=o"},
        {"import", "c1", "--stream=s"},
        {"import", "c1", "--statistics=f"},
        {"import", "c1", "--statistics=f", "--stream=s", "--portion=all"},
        {"export", "c1"},
        {"export", "c1", "--output=o", "--layout=lower"},
        {"submit", "--weights=w", "--weight=l"},
        {"submit", "--weights=w", "--weight=l", "--calibration=c", "--held_out_fraction=0.1"},
        {"submit", "--weights=w", "--weight=l", "--calibration=c", "--deadline=soon"},
        {"submit", "--weights=w", "--weight=l", "--calibration=c", "--order=natural",
         "--desc_act=true"}}) {
    EXPECT_EQ(Run(bad), kExitUsage) << ::testing::PrintToString(bad) << err_.str();
    EXPECT_TRUE(out_.str().empty());
    EXPECT_FALSE(err_.str().empty());
  }
  EXPECT_TRUE(calibrations_.calls.empty());
}

TEST_F(ServiceVerbsTest, EveryVerbExplainsItself) {
  for (const std::vector<std::string>& verb : {std::vector<std::string>{"calibrations", "create"},
                                               {"calibrations", "add"},
                                               {"calibrations", "finalize"},
                                               {"calibrations", "list"},
                                               {"calibrations", "get"},
                                               {"calibrations", "delete"},
                                               {"jobs", "list"},
                                               {"jobs", "get"},
                                               {"jobs", "delete"},
                                               {"submit"},
                                               {"watch"},
                                               {"result"},
                                               {"cancel"},
                                               {"import"},
                                               {"export"}}) {
    std::vector<std::string> arguments = verb;
    arguments.push_back("--help");
    EXPECT_EQ(Run(arguments), kExitOk);
    EXPECT_TRUE(Contains(out_.str(), "--token_file")) << verb.back();
  }
}

}  // namespace
}  // namespace certiq::cli
