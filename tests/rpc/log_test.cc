#include "observability/log.h"

#include <gtest/gtest.h>

#include "support/text.h"

namespace certiq::server {
namespace {

TEST(LogTest, TextIsOneLineWhateverANameHolds) {
  EXPECT_EQ(FormatText("rpc", {{"layer", std::string("model.layers.0")},
                               {"rows", int64_t{7}},
                               {"seconds", 0.5},
                               {"clean", true}}),
            "rpc layer=model.layers.0 rows=7 seconds=0.5 clean=true");
  EXPECT_EQ(FormatText("rpc", {{"layer", std::string("a b\n\x1b[31m\"\xff")}}),
            "rpc layer=\"a b\\n\\u001b[31m\\\"\\ufffd\"");
  EXPECT_EQ(FormatText("rpc", {{"layer", std::string()}}), "rpc layer=\"\"");
}

TEST(LogTest, JsonKeepsOrderAndEscapes) {
  EXPECT_EQ(FormatJson("info", "rpc", {{"layer", std::string("a\"\n")}, {"rows", int64_t{7}}}),
            R"("level":"info","event":"rpc","layer":"a\"\n","rows":7)");
}

TEST(LogTest, BracesAreText) {
  ::testing::internal::CaptureStderr();
  Log(LogFormat::kText).Info("x", {{"layer", std::string("{}{0}%v")}});
  Log(LogFormat::kJson).Error("y", {{"layer", std::string("{}")}});
  const std::string out = ::testing::internal::GetCapturedStderr();
  EXPECT_CONTAINS(out, "info x layer=\"{}{0}%v\"");
  EXPECT_CONTAINS(out, R"("level":"error","event":"y","layer":"{}"})");
}

}  // namespace
}  // namespace certiq::server
