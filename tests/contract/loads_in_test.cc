#include "contract/loads_in.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "contract/certificate.h"

namespace certiq::server {
namespace {

using engine::Format;

std::vector<std::string> Names(const engine::ResolvedSpec& spec) {
  std::vector<std::string> names;
  for (const v1::Reader& reader : LoadsIn(spec)) names.push_back(reader.name());
  return names;
}

engine::ResolvedSpec SpecOf(Format format, int32_t bits, bool symmetric, int64_t group_size) {
  engine::ResolvedSpec spec;
  spec.format = format;
  spec.bits = bits;
  spec.symmetric = symmetric;
  spec.group_size = group_size;
  return spec;
}

using Strings = std::vector<std::string>;

TEST(LoadsInTest, GptqDependsOnBitsGridAndGroups) {
  const Strings all = {"GPTQModel", "transformers", "vLLM"};
  const Strings some = {"GPTQModel", "transformers"};
  EXPECT_EQ(Names(SpecOf(Format::kGptq, 4, true, 128)), all);
  EXPECT_EQ(Names(SpecOf(Format::kGptqV2, 8, true, 0)), all);
  EXPECT_EQ(Names(SpecOf(Format::kGptq, 3, true, 128)), some);
  EXPECT_EQ(Names(SpecOf(Format::kGptqV2, 4, false, 128)), some);
  EXPECT_EQ(Names(SpecOf(Format::kGptq, 4, true, 16)), some);
  EXPECT_EQ(Names(SpecOf(Format::kGptq, 4, true, 48)), Strings());
  EXPECT_EQ(Names(SpecOf(Format::kGptq, 5, true, 128)), Strings());
}

TEST(LoadsInTest, GroupsInAnotherOrderAreFewerReaders) {
  engine::ResolvedSpec spec = SpecOf(Format::kGptq, 4, true, 128);
  spec.order = engine::Order::kDecreasingNorm;
  EXPECT_EQ(Names(spec).size(), 3U) << "static groups are runs of columns";
  spec.group_scales = engine::GroupScales::kDynamic;
  EXPECT_EQ(Names(spec), (Strings{"GPTQModel", "transformers"}));
  spec.group_size = 0;
  EXPECT_EQ(Names(spec).size(), 3U) << "one scale a row has no order";
}

TEST(LoadsInTest, CompressedTensors) {
  const Strings all = {"compressed-tensors", "transformers", "vLLM"};
  for (const int32_t bits : {2, 3, 4, 5, 6, 7, 8}) {
    EXPECT_EQ(Names(SpecOf(Format::kCompressedTensors, bits, true, 32)), all) << bits;
    const bool vllm = bits == 4 || bits == 8;
    EXPECT_EQ(Names(SpecOf(Format::kCompressedTensors, bits, false, 32)),
              vllm ? all : Strings({"compressed-tensors", "transformers"}))
        << bits;
  }
}

// Every line is asked by some spec, and is complete.
TEST(LoadsInTest, EveryReaderHasReleasesAndADay) {
  for (const Format format : {Format::kDenseF32, Format::kDenseF16, Format::kDenseBF16,
                              Format::kGptq, Format::kGptqV2, Format::kCompressedTensors}) {
    const std::vector<v1::Reader> readers = LoadsIn(SpecOf(format, 4, true, 0));
    EXPECT_FALSE(readers.empty());
    for (const v1::Reader& reader : readers) {
      EXPECT_FALSE(reader.name().empty());
      EXPECT_FALSE(reader.versions().empty());
      EXPECT_EQ(reader.checked().size(), 10U) << reader.checked();
    }
  }
}

TEST(LoadsInTest, CertificatesSayWhoAndWarnWhereNobodyDoes) {
  engine::LayerCertificate certificate;
  certificate.spec = SpecOf(Format::kGptq, 4, true, 128);
  const v1::Certificate known = ToProto(certificate, {})[0];
  ASSERT_EQ(known.loads_in_size(), 3);
  EXPECT_EQ(known.loads_in(2).name(), "vLLM");
  EXPECT_EQ(known.warnings_size(), 0);
  certificate.spec.bits = 7;
  const v1::Certificate unknown = ToProto(certificate, {})[0];
  EXPECT_EQ(unknown.loads_in_size(), 0);
  ASSERT_EQ(unknown.warnings_size(), 1);
  EXPECT_NE(unknown.warnings(0).find("no reader"), std::string::npos);
}

}  // namespace
}  // namespace certiq::server
