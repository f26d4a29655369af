// Malformed safetensors files, and the errors that they give.
#include <ostream>
#include <string>
#include <vector>

#include "certiq/safetensors.h"
#include "gtest/gtest.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Contains;
using testing::SafetensorsBytes;

struct Malformed {
  const char* name;
  std::string json;
  size_t data_bytes;
  // What the error names.
  std::vector<std::string> expected;
};

void PrintTo(const Malformed& malformed, std::ostream* out) { *out << malformed.json; }

class MalformedTest : public ::testing::TestWithParam<Malformed> {};

TEST_P(MalformedTest, IsRejectedWithFileFieldAndReason) {
  const std::string bytes = SafetensorsBytes(GetParam().json, GetParam().data_bytes);
  const auto header = ParseSafetensorsHeader(bytes, bytes.size(), "file.safetensors");
  ASSERT_EQ(header.status().code(), absl::StatusCode::kInvalidArgument);
  const std::string message(header.status().message());
  EXPECT_EQ(message.rfind("file.safetensors: ", 0), 0);
  EXPECT_TRUE(Contains(message, "expected"));
  for (const std::string& part : GetParam().expected) EXPECT_TRUE(Contains(message, part));
}

std::string One(const std::string& fields) { return R"({"t":{)" + fields + "}}"; }
std::string Shape(const std::string& shape, const std::string& offsets = "[0,8]") {
  return One(R"("dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + offsets);
}

INSTANTIATE_TEST_SUITE_P(
    Json, MalformedTest,
    ::testing::Values(
        Malformed{"Invalid", "{", 0, {"header", "valid JSON"}},
        Malformed{"Spaces", "    ", 0, {"header", "JSON object"}},
        Malformed{"Array", "[]", 0, {"header", "JSON object", "\"[\""}},
        Malformed{"Number", "7", 0, {"header", "JSON object"}},
        Malformed{"Trailing", "{} x", 0, {"valid JSON"}},
        Malformed{"TwoObjects", "{}{}", 0, {"valid JSON"}},
        Malformed{"NotUtf8", "{\"\xff\":1}", 0, {"valid JSON"}},
        Malformed{"Zeros", std::string("{}\0\0", 4), 0, {"valid JSON"}},
        Malformed{"Deep", "{\"t\":" + std::string(100000, '['), 0, {"object for \"t\""}},
        Malformed{"EntryNotObject", R"({"t":3})", 0, {"an object for \"t\"", "got 3"}},
        Malformed{"EntryArray", R"({"t":[]})", 0, {"an object for \"t\""}},
        Malformed{"EmptyName",
                  R"({"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
                  0,
                  {"empty tensor name"}},
        Malformed{"DuplicateTensor",
                  R"({"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
                  R"("t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
                  0,
                  {"every tensor once", "\"t\" twice"}},
        Malformed{"DuplicateField",
                  One(R"("dtype":"U8","dtype":"U8")"),
                  0,
                  {"tensor \"t\"", "dtype", "once"}},
        Malformed{"MetadataNotObject", R"({"__metadata__":"x"})", 0, {"__metadata__"}},
        Malformed{"MetadataNotStrings",
                  R"({"__metadata__":{"k":1}})",
                  0,
                  {"a string for __metadata__ key \"k\"", "got 1"}},
        Malformed{"MetadataNested", R"({"__metadata__":{"k":{}}})", 0, {"__metadata__ key \"k\""}},
        Malformed{"MetadataDuplicate",
                  R"({"__metadata__":{"k":"1","k":"2"}})",
                  0,
                  {"__metadata__", "\"k\""}},
        Malformed{"MetadataTwice", R"({"__metadata__":{},"__metadata__":{}})", 0, {"twice"}}),
    [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Fields, MalformedTest,
    ::testing::Values(
        Malformed{"NoDtype",
                  One(R"("shape":[0],"data_offsets":[0,0])"),
                  0,
                  {"tensor \"t\"", "dtype", "nothing"}},
        Malformed{"NoShape",
                  One(R"("dtype":"U8","data_offsets":[0,0])"),
                  0,
                  {"tensor \"t\"", "shape", "nothing"}},
        Malformed{"NoOffsets",
                  One(R"("dtype":"U8","shape":[0])"),
                  0,
                  {"tensor \"t\"", "data_offsets", "nothing"}},
        Malformed{"UnknownDtype",
                  One(R"("dtype":"float32","shape":[0],"data_offsets":[0,0])"),
                  0,
                  {"dtype", "\"float32\""}},
        Malformed{"EmptyDtype",
                  One(R"("dtype":"","shape":[0],"data_offsets":[0,0])"),
                  0,
                  {"dtype", "\"\""}},
        Malformed{"DtypeNumber",
                  One(R"("dtype":4,"shape":[0],"data_offsets":[0,0])"),
                  0,
                  {"dtype", "a string", "got 4"}},
        Malformed{"DtypeNull", One(R"("dtype":null)"), 0, {"dtype", "a string", "got null"}},
        Malformed{"DtypeArray", One(R"("dtype":["F32"])"), 0, {"dtype", "a string"}},
        Malformed{"ShapeNumber", Shape("2"), 8, {"shape", "an array", "got 2"}},
        Malformed{"ShapeObject", Shape("{}"), 8, {"shape", "an array"}},
        Malformed{"ShapeNegative", Shape("[-2]"), 8, {"shape", "got -2"}},
        Malformed{"ShapeFraction", Shape("[2.0]"), 8, {"shape", "got 2.0"}},
        Malformed{"ShapeString", Shape(R"(["2"])"), 8, {"shape", "got \"2\""}},
        Malformed{"ShapeNested", Shape("[[2]]"), 8, {"shape", "an array"}},
        Malformed{"ShapeBool", Shape("[true]"), 8, {"shape", "got true"}},
        Malformed{
            "ShapePast63Bits", Shape("[9223372036854775808]"), 8, {"shape", "9223372036854775808"}},
        Malformed{"ShapePast64Bits", Shape("[99999999999999999999999]"), 8, {"shape"}},
        Malformed{"ShapeOverflow", Shape("[4294967296,4294967296]"), 8, {"shape", "64 bits"}},
        // 2^62 floats: the elements fit 64 bits, the bytes would come to 0 without a check.
        Malformed{
            "BytesOverflow", Shape("[4611686018427387904]", "[0,0]"), 0, {"shape", "64 bits"}},
        Malformed{"OverflowUnknownDtype",
                  One(R"("dtype":"Q1","shape":[4294967296,4294967296],"data_offsets":[0,0])"),
                  0,
                  {"shape", "64 bits"}}),
    [](const auto& test) { return test.param.name; });

INSTANTIATE_TEST_SUITE_P(
    Offsets, MalformedTest,
    ::testing::Values(
        Malformed{"NotArray", Shape("[2]", "8"), 8, {"data_offsets", "an array"}},
        Malformed{"None", Shape("[2]", "[]"), 8, {"data_offsets", "0 numbers"}},
        Malformed{"One", Shape("[2]", "[8]"), 8, {"data_offsets", "1 numbers"}},
        Malformed{"Three", Shape("[2]", "[0,8,9]"), 8, {"data_offsets", "third"}},
        Malformed{"Negative", Shape("[2]", "[-8,0]"), 8, {"data_offsets", "-8"}},
        Malformed{"Fraction", Shape("[2]", "[0,8.5]"), 8, {"data_offsets", "8.5"}},
        Malformed{"Text", Shape("[2]", R"(["0","8"])"), 8, {"data_offsets", "\"0\""}},
        Malformed{"Huge", Shape("[2]", "[0,18446744073709551616]"), 8, {"data_offsets"}},
        Malformed{"Reversed", Shape("[2]", "[8,0]"), 8, {"data_offsets", "begin <= end", "[8, 0]"}},
        Malformed{"PastTheEnd", Shape("[2]", "[0,8]"), 7, {"data_offsets", "the 7 bytes of data"}},
        Malformed{"FarPastTheEnd", Shape("[2]", "[0,18446744073709551615]"), 8, {"data_offsets"}},
        Malformed{"TooSmall", Shape("[3]", "[0,8]"), 8, {"data_offsets", "12 bytes", "got 8"}},
        Malformed{"TooLarge", Shape("[1]", "[0,8]"), 8, {"data_offsets", "4 bytes", "got 8"}},
        Malformed{"EmptyWithBytes", Shape("[0]", "[0,8]"), 8, {"data_offsets", "0 bytes"}},
        Malformed{"SizeOfOtherDtype",
                  One(R"("dtype":"I16","shape":[2],"data_offsets":[0,8])"),
                  8,
                  {"data_offsets", "4 bytes for I16"}},
        Malformed{"HalfAByte",
                  One(R"("dtype":"F4","shape":[3],"data_offsets":[0,1])"),
                  1,
                  {"data_offsets", "2 bytes for F4"}},
        Malformed{"HoleInFront", Shape("[2]", "[4,12]"), 12, {"beginning of the data", "(hole)"}},
        Malformed{"HoleBetween",
                  R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                  R"("b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})",
                  5,
                  {"tensor \"b\"", "where \"a\" ends", "(hole)"}},
        Malformed{"Overlap",
                  R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                  R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                  3,
                  {"tensor \"b\"", "where \"a\" ends", "(overlap)"}},
        Malformed{"SameBytesTwice",
                  R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                  R"("b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
                  2,
                  {"(overlap)"}},
        Malformed{"HoleAtTheEnd", Shape("[2]", "[0,8]"), 9, {"data", "8 bytes", "got 9"}},
        Malformed{"DataWithoutTensors", "{}", 1, {"data", "0 bytes", "got 1"}}),
    [](const auto& test) { return test.param.name; });

absl::Status LengthStatus(uint64_t length, uint64_t file_bytes) {
  std::string bytes = SafetensorsBytes("{}", 0);
  std::memcpy(bytes.data(), &length, sizeof(length));
  return ParseSafetensorsHeader(bytes, file_bytes, "f").status();
}

TEST(MalformedLengthTest, IsRejected) {
  for (const uint64_t length : {uint64_t{0}, uint64_t{3}, uint64_t{100'000'001}, ~uint64_t{0},
                                ~uint64_t{0} - 7, uint64_t{1} << 63}) {
    const absl::Status status = LengthStatus(length, 10);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << length;
    EXPECT_TRUE(Contains(status.message(), "f: header length: expected"));
  }
}

TEST(MalformedLengthTest, CapHoldsEvenInAFileThatIsLarge) {
  EXPECT_TRUE(Contains(LengthStatus(100'000'001, uint64_t{1} << 40).message(),
                       "expected 1 to 100000000 bytes, got 100000001"));
}

TEST(MalformedLengthTest, EveryTruncationOfAFileIsRejected) {
  const std::string whole = SafetensorsBytes(Shape("[2]"), 8);
  ASSERT_TRUE(ParseSafetensorsHeader(whole, whole.size(), "f").ok());
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(ParseSafetensorsHeader(whole.substr(0, size), size, "f").ok()) << size;
  }
}

TEST(MalformedLengthTest, LongNamesAreCutInErrors) {
  const std::string bytes = SafetensorsBytes("{\"" + std::string(100000, 'n') + "\":3}", 0);
  EXPECT_LT(ParseSafetensorsHeader(bytes, bytes.size(), "f").status().message().size(), 300);
}

}  // namespace
}  // namespace certiq
