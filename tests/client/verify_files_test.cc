// `certiq verify` on files, and what it says of files that do not serve.

#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "certiq/safetensors.h"
#include "command.h"
#include "files.h"
#include "temporary_folder.h"
#include "test_util.h"
#include "verify_layers.h"

namespace certiq::cli {
namespace {

using testing::Contains;
using testing::WriteFile;

class VerifyFilesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    testing::LayerOptions options;
    options.mismatched = true;
    engine::ResolvedSpec spec;
    spec.group_size = 16;
    auto layer = testing::QuantizeRandom(options, spec);
    ASSERT_TRUE(layer.ok()) << layer.status();
    layer_ = *std::move(layer);
    ASSERT_TRUE(WriteSafetensors(folder_.Path("w"), {layer_.weight.View()}).ok());
    ASSERT_TRUE(
        WriteSafetensors(folder_.Path("a"), {layer_.x.View(), layer_.x_quantized->View()}).ok());
    std::vector<TensorView> tensors;
    for (const OwnedTensor& tensor : layer_.result) {
      tensors.push_back(tensor.View());
      tensors.back().name = OutputName("l.weight", tensor.name);
    }
    ASSERT_TRUE(WriteSafetensors(folder_.Path("o"), tensors).ok());
    report_ = ReportText(layer_.certificate).value();
    WriteFile(folder_.Path("r"), report_);
  }

  int Run(const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {
        "verify",        "--weight=l.weight", "--x=l.x",  "--weights",      folder_.Path("w"),
        "--activations", folder_.Path("a"),   "--result", folder_.Path("o")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    out_.str("");
    err_.str("");
    return RunCommand(arguments, Io{.out = out_, .err = err_, .interrupt = {}});
  }
  int RunAll(const std::string& report) {
    WriteFile(folder_.Path("r"), report);
    return Run({"--x_quantized=l.xq", "--report", folder_.Path("r")});
  }

  testing::TemporaryFolder folder_;
  testing::VerifiedLayer layer_;
  std::string report_;
  std::ostringstream out_;
  std::ostringstream err_;
};

TEST_F(VerifyFilesTest, HoldsLineByLine) {
  EXPECT_EQ(RunAll(report_), kExitOk) << out_.str() << err_.str();
  EXPECT_TRUE(Contains(out_.str(), "ok           relative_error  0."));
  EXPECT_TRUE(
      Contains(out_.str(), "not checked  phase_seconds  (wall-clock time leaves no trace)"));
  EXPECT_TRUE(Contains(out_.str(), "The certificate holds: "));
}

TEST_F(VerifyFilesTest, WrongNumbersAreNamed) {
  v1::Certificate wrong = layer_.certificate;
  wrong.set_squared_error(1.02 * wrong.squared_error());
  EXPECT_EQ(RunAll(ReportText(wrong).value()), kExitFailed);
  EXPECT_TRUE(Contains(out_.str(), "WRONG        squared_error  "));
  EXPECT_TRUE(Contains(out_.str(), "The certificate is WRONG: 1 of "));
  // Without X~ the numbers are those of another problem.
  WriteFile(folder_.Path("r"), report_);
  EXPECT_EQ(Run({"--report", folder_.Path("r")}), kExitFailed);
  EXPECT_TRUE(Contains(out_.str(), "WRONG        x_quantized_sha256"));
}

TEST_F(VerifyFilesTest, FilesThatDoNotServe) {
  EXPECT_EQ(RunAll("{\"rows\": 1"), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "not a certificate as protobuf JSON"));
  EXPECT_EQ(RunAll("{\"colour\": 1}"), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "colour"));
  EXPECT_EQ(RunAll("{}"), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "has no spec"));
  WriteFile(folder_.Path("r"), report_);
  EXPECT_EQ(Run({"--report", folder_.Path("none")}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "none: cannot be opened"));
  EXPECT_EQ(Run({"--report", folder_.Path("r"), "--x_quantized=none"}), kExitFailed);
  EXPECT_TRUE(Contains(err_.str(), "NOT_FOUND"));
  WriteFile(folder_.Path("o"), "broken");
  EXPECT_EQ(Run({"--report", folder_.Path("r")}), kExitFailed);
  EXPECT_TRUE(out_.str().empty());
}

TEST_F(VerifyFilesTest, UsageErrorsAreTwo) {
  EXPECT_EQ(Run({}), kExitUsage);
  EXPECT_TRUE(Contains(err_.str(), "--report"));
  EXPECT_EQ(Run({"--report=r", "--server=s"}), kExitUsage);
}

}  // namespace
}  // namespace certiq::cli
