// The whole command in one process: arguments in, files, streams and exit code out.
#include "command.h"

#include <filesystem>
#include <sstream>
#include <stop_token>
#include <string>
#include <utility>
#include <vector>

#include "certiq/safetensors.h"
#include "certiq/v1/readers_table.h"
#include "fake_server.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "temporary_folder.h"
#include "test_util.h"

namespace certiq::cli {
namespace {

using testing::Answering;
using testing::BusyStatus;
using testing::Contains;
using testing::FakeServer;
using testing::FieldStatus;
using testing::MakeLayer;
using testing::MakeTensor;
using testing::Names;
using testing::ReadFile;
using testing::ReceiveAll;
using testing::ServerStream;
using testing::TemporaryFolder;
using testing::WriteFile;

class CommandTest : public ::testing::Test {
 protected:
  CommandTest() {
    EXPECT_TRUE(WriteSafetensors(folder_.Path("w"), {layer_.weight.View(), bytes_.View()}).ok());
    EXPECT_TRUE(
        WriteSafetensors(folder_.Path("a"), {layer_.x.View(), layer_.x_quantized.View()}).ok());
  }

  // Runs `quantize` on the layer against the server.
  int Quantize(const FakeServer& server, const std::vector<std::string>& more = {}) {
    return Quantize(server.address(), more);
  }
  int Quantize(const std::string& address, const std::vector<std::string>& more,
               const std::string& weight = "l.weight") {
    std::vector<std::string> arguments = {"quantize",        "--server", address, "--weights",
                                          folder_.Path("w"), "--weight", weight,  "--activations",
                                          folder_.Path("a"), "--x=l.x"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Run(arguments);
  }
  int Run(const std::vector<std::string>& arguments) {
    ClientOptions client;
    client.sleep = [](absl::Duration, const std::stop_token& stop) {
      return !stop.stop_requested();
    };
    return RunCommand(
        arguments,
        Io{.out = out_, .err = err_, .interrupt = interrupt_.get_token(), .client = client});
  }

  TemporaryFolder folder_;
  testing::Layer layer_ = MakeLayer(6, 8, 20);
  OwnedTensor bytes_ = MakeTensor("bytes", v1::DATA_TYPE_U8, {6, 8});
  std::stop_source interrupt_;
  std::ostringstream out_;
  std::ostringstream err_;
};

TEST_F(CommandTest, WritesResultReportAndSummary) {
  testing::Upload upload;
  FakeServer server([&upload](int, grpc::ServerContext*, ServerStream* stream) {
    upload = ReceiveAll(stream);
    for (const auto& frame : GoodAnswer(upload)) stream->Write(frame);
    return grpc::Status::OK;
  });
  ASSERT_EQ(Quantize(server, {"--x_quantized=l.x_quantized", "--held_out_fraction=0.25", "--bits=9",
                              "--output", folder_.Path("o"), "--report", folder_.Path("r")}),
            kExitOk)
      << err_.str();
  EXPECT_EQ(upload.header.layer_name(), "l.weight");
  EXPECT_EQ(upload.header.request_id().size(), 36);
  EXPECT_EQ(upload.header.spec().bits(), 9);
  EXPECT_EQ(upload.header.held_out_fraction(), 0.25);
  EXPECT_EQ(upload.weight, layer_.weight.data);
  EXPECT_EQ(upload.x_quantized, layer_.x_quantized.data);

  const auto output = SafetensorsFile::Open(folder_.Path("o"));
  ASSERT_TRUE(output.ok()) << output.status();
  ASSERT_TRUE(output->Tensor("l.weight").ok());
  EXPECT_EQ(output->Tensor("l.weight")->data, layer_.weight.data);
  EXPECT_TRUE(output->Tensor("l.scales").ok());
  const auto report = nlohmann::json::parse(ReadFile(folder_.Path("r")), nullptr, false);
  EXPECT_EQ(report["schema_version"], 1);
  EXPECT_EQ(report["clipped_weights"], "0");
  EXPECT_TRUE(Contains(out_.str(), "l.weight [6, 8] F32"));
  EXPECT_TRUE(Contains(out_.str(), "wrote           " + folder_.Path("o")));
  EXPECT_TRUE(Contains(err_.str(), "upload "));
  EXPECT_TRUE(Contains(err_.str(), "factor\nround\n"));
  EXPECT_EQ(folder_.Names(), Names({"w", "a", "o", "r"}));
}

TEST_F(CommandTest, WithoutOutputsNothingIsWritten) {
  FakeServer server(Answering());
  EXPECT_EQ(Quantize(server), kExitOk) << err_.str();
  EXPECT_EQ(folder_.Names(), Names({"w", "a"}));
}

TEST_F(CommandTest, TheServersRejectionIsPrintedWithFieldFlagAndAdvice) {
  FakeServer server([](int, grpc::ServerContext*, ServerStream*) {
    return FieldStatus("spec.bits", "expected 2 to 8, got 9");
  });
  EXPECT_EQ(Quantize(server, {"--bits=9", "--output", folder_.Path("o")}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(),
                       "certiq: INVALID_ARGUMENT: spec.bits: expected 2 to 8, got 9\n"
                       "  field spec.bits (--bits)\n"
                       "  advice: "));
  EXPECT_TRUE(out_.str().empty());
  EXPECT_EQ(folder_.Names(), Names({"w", "a"}));
}

TEST_F(CommandTest, ABusyServerIsTriedAgain) {
  FakeServer server([](int call, grpc::ServerContext* context, ServerStream* stream) {
    if (call == 1) return BusyStatus(absl::Seconds(3));
    return Answering()(call, context, stream);
  });
  EXPECT_EQ(Quantize(server), kExitOk);
  EXPECT_TRUE(Contains(err_.str(), "try 1: RESOURCE_EXHAUSTED: the queue is full; next in 3."));
}

TEST_F(CommandTest, OutputsThatCannotBeWrittenAreFoundBeforeTheUpload) {
  FakeServer server(Answering());
  WriteFile(folder_.Path("file"), "");
  for (const std::string& bad : {folder_.Path("no/o"), folder_.Path(""), folder_.Path("file/o")}) {
    EXPECT_EQ(Quantize(server, {"--output", bad}), kExitFailed);
    EXPECT_EQ(Quantize(server, {"--output", folder_.Path("o"), "--report", bad}), kExitFailed);
    EXPECT_TRUE(Contains(err_.str(), bad));
  }
  EXPECT_EQ(server.calls(), 0);
  EXPECT_EQ(folder_.Names(), Names({"w", "a", "file"}));
}

TEST_F(CommandTest, InputsThatDoNotServeAreFoundBeforeTheUpload) {
  FakeServer server(Answering());
  EXPECT_EQ(Quantize(server.address(), {}, "other"), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "NOT_FOUND"));
  EXPECT_EQ(Quantize(server.address(), {}, "bytes"), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "weight.dtype"));
  EXPECT_EQ(Quantize(server, {"--x_quantized=none"}), kExitFailed);
  WriteFile(folder_.Path("a"), "broken file");
  EXPECT_EQ(Quantize(server), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "header length"));
  std::filesystem::remove(folder_.Path("a"));
  EXPECT_EQ(Quantize(server), kExitFailed);
  EXPECT_EQ(server.calls(), 0);
}

TEST_F(CommandTest, AnInterruptCancelsAndLeavesNothing) {
  FakeServer server([this](int, grpc::ServerContext* context, ServerStream* stream) {
    auto frames = GoodAnswer(ReceiveAll(stream));
    for (size_t i = 0; i < 5; ++i) stream->Write(frames[i]);
    interrupt_.request_stop();
    // Ends when the cancellation arrives.
    while (!context->IsCancelled() && stream->Write(frames[0])) {
    }
    return grpc::Status::CANCELLED;
  });
  EXPECT_EQ(Quantize(server, {"--output", folder_.Path("o"), "--report", folder_.Path("r")}),
            kExitInterrupted);
  EXPECT_TRUE(Contains(err_.str(), "interrupted"));
  EXPECT_EQ(folder_.Names(), Names({"w", "a"}));
}

TEST_F(CommandTest, AnswersThatLieLeaveOldFilesAlone) {
  FakeServer server(Answering([](std::vector<v1::QuantizeResponse>* frames) {
    frames->at(3).mutable_chunk()->set_tensor(7);
  }));
  WriteFile(folder_.Path("o"), "old");
  EXPECT_EQ(Quantize(server, {"--output", folder_.Path("o")}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "INTERNAL"));
  EXPECT_EQ(ReadFile(folder_.Path("o")), "old");
}

TEST_F(CommandTest, FilesForTlsAndTokensMustServe) {
  FakeServer server(Answering());
  WriteFile(folder_.Path("garbage"), "");
  for (const char* flag : {"--tls_ca", "--token_file"}) {
    for (const char* file : {"garbage", "no_such_file"}) {
      EXPECT_EQ(Quantize(server, {flag, folder_.Path(file)}), kExitFailed);
      EXPECT_TRUE(Contains(err_.str(), folder_.Path(file))) << err_.str();
    }
  }
  EXPECT_EQ(Quantize(server, {"--tls_cert", "f"}), kExitUsage);
  EXPECT_EQ(Quantize(server, {"--tls_key", "f"}), kExitUsage);
  EXPECT_EQ(server.calls(), 0);
}

TEST_F(CommandTest, UsageErrorsAreTwo) {
  EXPECT_EQ(Run({}), kExitUsage);
  EXPECT_EQ(Run({"frobnicate"}), kExitUsage);
  EXPECT_EQ(Run({"--frobnicate"}), kExitUsage);
  EXPECT_EQ(Run({"quantize"}), kExitUsage);
  EXPECT_EQ(Run({"version", "extra"}), kExitUsage);
  EXPECT_EQ(Quantize("localhost:1", {"--bits=x"}), kExitUsage);
  EXPECT_EQ(Quantize("localhost:1", {"--unknown"}), kExitUsage);
  EXPECT_TRUE(Contains(err_.str(), "--unknown"));
  EXPECT_TRUE(out_.str().empty());
}

TEST_F(CommandTest, VersionAndHelp) {
  EXPECT_EQ(Run({"version"}), kExitOk);
  EXPECT_EQ(Run({"--version"}), kExitOk);
  EXPECT_EQ(out_.str(), Version() + "\n" + Version() + "\n");
  EXPECT_EQ(Run({"--help"}), kExitOk);
  EXPECT_EQ(Run({"quantize", "--help"}), kExitOk);
  EXPECT_TRUE(Contains(out_.str(), "--held_out_fraction"));
  // Who loads which format, from the contract's table.
  for (const auto& arguments :
       {std::vector<std::string>{"--help"}, {"quantize", "--help"}, {"submit", "--help"}}) {
    out_.str("");
    EXPECT_EQ(Run(arguments), kExitOk);
    for (const v1::ReaderLine& line : v1::kReaderLines) {
      EXPECT_TRUE(Contains(out_.str(), std::string("    ") + line.reader + " " + line.versions));
      EXPECT_TRUE(Contains(out_.str(), line.formats));
      EXPECT_TRUE(Contains(out_.str(), line.note));
      EXPECT_TRUE(Contains(out_.str(), line.checked));
    }
  }
}

}  // namespace
}  // namespace certiq::cli
