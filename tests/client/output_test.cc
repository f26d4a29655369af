// Output of the command, without a server.
#include <limits>
#include <set>
#include <sstream>
#include <string>

#include "certiq/status.h"
#include "certiq/uuid.h"
#include "errors.h"
#include "fake_server.h"
#include "files.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "progress.h"
#include "regex_match.h"
#include "summary.h"
#include "test_util.h"

namespace certiq::cli {
namespace {

using testing::Contains;
using testing::Matches;

v1::Certificate MakeCertificate() {
  v1::Certificate certificate;
  certificate.set_rows(3);
  certificate.set_features(100);
  certificate.set_tokens(2048);
  certificate.set_method(v1::METHOD_OPTQ);
  certificate.set_bits(4);
  certificate.set_symmetric(true);
  certificate.set_outcome(v1::OUTCOME_QUANTIZED);
  certificate.set_bits_per_weight(4.25);
  certificate.set_lambda_requested(1.5);
  certificate.set_lambda_used(15);
  certificate.add_damping_attempts();
  certificate.add_damping_attempts();
  certificate.set_reference_energy(100);
  certificate.set_squared_error(0.16);
  certificate.set_damped_squared_error(0.25);
  certificate.set_relative_error(0.04);
  certificate.set_nearest_relative_error(0.1);
  certificate.set_l2_bound(2);
  for (const double error : {1.0, 2.0, 3.0}) certificate.add_row_error(error);
  for (const double bound : {1.0, 2.5, 2.0}) certificate.add_row_bound(bound);
  certificate.set_clipped_weights(3);
  certificate.set_clipped_rows(2);
  certificate.set_dead_features(7);
  certificate.mutable_underflow()->set_groups(6);
  certificate.mutable_underflow()->set_rows(2);
  v1::Reader* const reader = certificate.add_loads_in();
  reader->set_name("vLLM");
  reader->set_versions("0.32");
  certificate.set_condition_estimate(12345);
  certificate.mutable_phase_seconds()->set_factor(0.25);
  certificate.mutable_phase_seconds()->set_round(2);
  certificate.add_warnings("mind\x1b[2J the gap");
  return certificate;
}

TEST(SummaryTest, SaysWhatTheCertificateSays) {
  const std::string text = SummaryText("l.weight", v1::DATA_TYPE_F32, MakeCertificate());
  for (const char* part :
       {"l.weight [3, 100] F32", "OPTQ, 4 bits symmetric, one scale a row",
        "4.25 bits a weight, 7.53 times smaller than F32", "0.04000 relative",
        "0.10000 relative; this result is 2.50 times smaller", "0.20000 relative, proven",
        "the damped error is 0.25 of it", "2 of 3 within their bound",
        "lambda 15 used (1.5 asked), 2 attempts", "1.2e+04", "3 weights (1 %) in 2 of 3 rows",
        "7 dead of 100", "6 scales in 2 of 3 rows", "vLLM 0.32", "2048 fitted, 0 held out",
        "2.25 s (receive 0 ms, queue 0 ms, factor 250 ms", "mind [2J the gap"}) {
    EXPECT_TRUE(Contains(text, part));
  }
  EXPECT_FALSE(Contains(text, "unseen"));
  EXPECT_FALSE(Contains(text, "\x1b"));
  EXPECT_EQ(text.back(), '\n');
  // Labels, then values in one column.
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    EXPECT_EQ(line[15], ' ') << line;
    EXPECT_NE(line[16], ' ') << line;
  }
}

TEST(SummaryTest, HeldOutGroupsAndFallback) {
  v1::Certificate certificate = MakeCertificate();
  certificate.set_held_out_tokens(256);
  certificate.set_held_out_relative_error(0.07);
  certificate.set_group_size(64);
  certificate.set_symmetric(false);
  certificate.set_outcome(v1::OUTCOME_FELL_BACK_TO_NEAREST);
  const std::string text = SummaryText("l", v1::DATA_TYPE_BF16, certificate);
  EXPECT_TRUE(Contains(text, "asymmetric, groups of 64 features"));
  EXPECT_TRUE(Contains(text, "0.07000 relative on 256 held-out tokens"));
  EXPECT_TRUE(Contains(text, "FELL BACK TO PLAIN ROUNDING"));
  EXPECT_TRUE(Contains(text, "3.76 times smaller than BF16"));
}

TEST(SummaryTest, AnEmptyCertificateDividesByNothing) {
  const std::string text = SummaryText("l", v1::DATA_TYPE_F32, v1::Certificate());
  EXPECT_FALSE(Contains(text, "nan"));
  EXPECT_FALSE(Contains(text, "inf"));
}

TEST(ReportTest, FieldNamesDefaultsAndNewline) {
  v1::Certificate certificate = MakeCertificate();
  certificate.set_linf_bound(std::numeric_limits<double>::infinity());
  const absl::StatusOr<std::string> text = ReportText(certificate);
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(text->substr(text->size() - 2), "}\n");
  const auto json = nlohmann::json::parse(*text, nullptr, false);
  ASSERT_TRUE(json.is_object());
  EXPECT_EQ(json["rows"], "3");
  EXPECT_EQ(json["held_out_tokens"], "0");
  EXPECT_EQ(json["outcome"], "OUTCOME_QUANTIZED");
  EXPECT_EQ(json["relative_error"], 0.04);
  EXPECT_EQ(json["row_bound"].size(), 3);
  EXPECT_EQ(json["ladder"].size(), 0);
  EXPECT_EQ(json["linf_bound"], "Infinity");
}

TEST(OutputNameTest, RolesBecomeCheckpointNames) {
  EXPECT_EQ(OutputName("a.q_proj.weight", "weight"), "a.q_proj.weight");
  EXPECT_EQ(OutputName("a.q_proj.weight", "scales"), "a.q_proj.scales");
  EXPECT_EQ(OutputName("a.q_proj.weight", "qweight"), "a.q_proj.qweight");
  EXPECT_EQ(OutputName("a.q_proj", "weight"), "a.q_proj");
  EXPECT_EQ(OutputName("a.q_proj", "g_idx"), "a.q_proj.g_idx");
  EXPECT_EQ(OutputName("weight", "scales"), "weight.scales");
}

TEST(UuidTest, IsVersionFourAndNeverTheSame) {
  std::set<std::string> seen;
  for (int i = 0; i < 100; ++i) {
    const std::string uuid = RandomUuid();
    EXPECT_TRUE(Matches(uuid,
                        "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-"
                        "[0-9a-f]{12}"));
    EXPECT_TRUE(seen.insert(uuid).second);
  }
}

TEST(ErrorsTest, CodeFieldFlagAndAdvice) {
  std::ostringstream err;
  const absl::Status status =
      FromGrpcStatus(testing::FieldStatus("spec.bits", "expected 2 to 8, got \x1b[1m9"));
  PrintError(status, "correct it", err);
  EXPECT_EQ(err.str(),
            "certiq: INVALID_ARGUMENT: spec.bits: expected 2 to 8, got  [1m9\n"
            "  field spec.bits (--bits)\n"
            "  advice: correct it\n");
}

TEST(ErrorsTest, AdviceForEveryCodeThatServersSend) {
  const auto advice = [](const absl::Status& status) { return AdviceFor(status, "h:1", "id-1"); };
  EXPECT_TRUE(Contains(advice(FromGrpcStatus(testing::BusyStatus(absl::Seconds(7)))), "7 s"));
  EXPECT_TRUE(Contains(advice(absl::UnavailableError("")), "h:1"));
  EXPECT_TRUE(Contains(advice(absl::InternalError("")), "id-1"));
  EXPECT_TRUE(Contains(advice(absl::FailedPreconditionError("")), "--damping"));
  EXPECT_TRUE(Contains(advice(absl::UnimplementedError("")), "certiq server"));
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "");
    const bool generic = absl::IsAlreadyExists(status) || absl::IsOutOfRange(status);
    EXPECT_EQ(advice(status).empty(), generic) << status;
  }
}

v1::Progress At(v1::Phase phase, double fraction) {
  v1::Progress progress;
  progress.set_phase(phase);
  progress.set_fraction(fraction);
  return progress;
}

TEST(ProgressTest, OneLineAPhaseWhereThereIsNoTerminal) {
  std::ostringstream err;
  {
    ProgressPrinter progress(&err, false);
    progress.Show(UploadProgress{.bytes = 0, .total_bytes = 3 << 20});
    progress.Show(UploadProgress{.bytes = 3 << 20, .total_bytes = 3 << 20});
    progress.Show(At(v1::PHASE_RECEIVE, 1));
    progress.Show(At(v1::PHASE_FACTOR, 0));
    progress.Show(UploadProgress{.bytes = 3 << 20, .total_bytes = 3 << 20});
    progress.Show(At(v1::PHASE_FACTOR, 0.5));
    progress.Show(At(v1::PHASE_ROUND, 0.5));
    progress.Show(RetryNotice{.error = absl::UnavailableError("down\n"),
                              .attempt = 1,
                              .delay = absl::Milliseconds(1500)});
    progress.Show(UploadProgress{.bytes = 1, .total_bytes = 3 << 20});
  }
  EXPECT_EQ(err.str(),
            "upload 3.0 MiB\nfactor\nround\ntry 1: UNAVAILABLE: down ; next in 1.5 s\n"
            "upload 3.0 MiB\n");
}

TEST(ProgressTest, ABarOnATerminalAndNothingLeftOfIt) {
  std::ostringstream err;
  {
    ProgressPrinter progress(&err, true);
    progress.Show(At(v1::PHASE_ROUND, 0.5));
    progress.Show(At(v1::PHASE_CERTIFY, 1e9));
    progress.Show(At(v1::PHASE_PACK, std::numeric_limits<double>::quiet_NaN()));
    progress.Show(At(static_cast<v1::Phase>(77), -3));
  }
  EXPECT_TRUE(Contains(err.str(), "round     [###############...............]  50 %"));
  EXPECT_TRUE(Contains(err.str(), "certify   [##############################] 100 %"));
  EXPECT_TRUE(Contains(err.str(), "pack      [..............................]   0 %"));
  EXPECT_TRUE(Contains(err.str(), "working"));
  EXPECT_EQ(err.str().substr(err.str().size() - 4), "\r\033[K");
}

}  // namespace
}  // namespace certiq::cli
