#include "certiq/safetensors.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "temporary_folder.h"
#include "test_util.h"

namespace certiq {
namespace {

using testing::Contains;
using testing::MakeTensor;
using testing::Names;
using testing::ReadFile;
using testing::SafetensorsBytes;
using testing::TemporaryFolder;
using testing::WriteFile;

TEST(SafetensorsTest, RoundTripKeepsEveryDtypeShapeAndByte) {
  const TemporaryFolder folder;
  const std::vector<OwnedTensor> tensors = {MakeTensor("u8", v1::DATA_TYPE_U8, {3, 5}),
                                            MakeTensor("f64", v1::DATA_TYPE_F64, {2, 3}),
                                            MakeTensor("f32", v1::DATA_TYPE_F32, {4}),
                                            MakeTensor("f16", v1::DATA_TYPE_F16, {1, 1}),
                                            MakeTensor("bf16", v1::DATA_TYPE_BF16, {2, 2}),
                                            MakeTensor("i64", v1::DATA_TYPE_I64, {}),
                                            MakeTensor("i32", v1::DATA_TYPE_I32, {1, 2, 3}),
                                            MakeTensor("empty", v1::DATA_TYPE_F32, {0, 7})};
  std::vector<TensorView> views;
  views.reserve(tensors.size());
  for (const OwnedTensor& tensor : tensors) views.push_back(tensor.View());
  const std::string path = folder.Path("t.safetensors");
  ASSERT_TRUE(WriteSafetensors(path, views, {{"format", "pt"}, {"clé", "é"}}).ok());
  EXPECT_EQ(folder.Names(), Names({"t.safetensors"}));

  const absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->entries().size(), tensors.size());
  EXPECT_EQ(file->metadata(), (std::map<std::string, std::string>{{"clé", "é"}, {"format", "pt"}}));
  for (const OwnedTensor& tensor : tensors) {
    const absl::StatusOr<TensorView> view = file->Tensor(tensor.name);
    ASSERT_TRUE(view.ok()) << view.status();
    EXPECT_EQ(view->dtype, tensor.dtype);
    EXPECT_EQ(view->shape, tensor.shape);
    EXPECT_EQ(view->data, tensor.data);
    const auto address = reinterpret_cast<uintptr_t>(view->data.data());
    EXPECT_EQ(address % static_cast<size_t>(DataTypeBytes(tensor.dtype)), 0) << tensor.name;
  }
}

TEST(SafetensorsTest, ViewsOutliveAMoveOfTheFile) {
  const TemporaryFolder folder;
  const OwnedTensor tensor = MakeTensor("t", v1::DATA_TYPE_F32, {2, 2});
  ASSERT_TRUE(WriteSafetensors(folder.Path("t"), {tensor.View()}).ok());
  absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(folder.Path("t"));
  ASSERT_TRUE(file.ok());
  const absl::StatusOr<TensorView> view = file->Tensor("t");
  const SafetensorsFile moved = *std::move(file);
  EXPECT_EQ(view->data, tensor.data);
}

TEST(SafetensorsTest, AFileWithoutTensorsIsReadable) {
  const TemporaryFolder folder;
  WriteFile(folder.Path("none"), SafetensorsBytes("{}", 0));
  const absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(folder.Path("none"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(file->entries().empty());
  EXPECT_EQ(file->Tensor("t").status().code(), absl::StatusCode::kNotFound);
}

TEST(SafetensorsTest, EmptyTensorsBetweenOthers) {
  const std::string bytes = SafetensorsBytes(
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
          "none":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},
          "b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}})",
      6);
  const auto header = ParseSafetensorsHeader(bytes, bytes.size(), "f");
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->entries.size(), 3);
}

TEST(SafetensorsTest, OtherDtypesParseAndOnlyAskingForThemIsAnError) {
  const TemporaryFolder folder;
  WriteFile(folder.Path("f"), SafetensorsBytes(
                                  R"({"a":{"dtype":"I16","shape":[2],"data_offsets":[0,4]},
                    "b":{"dtype":"BOOL","shape":[3],"data_offsets":[4,7]},
                    "c":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[7,8]},
                    "d":{"dtype":"F4","shape":[2,3],"data_offsets":[8,11]},
                    "e":{"dtype":"Q9_K","shape":[77],"data_offsets":[11,13]},
                    "w":{"dtype":"U8","shape":[1],"data_offsets":[13,14]}}  )",
                                  14));
  const absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(folder.Path("f"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(file->Tensor("w").ok());
  for (const char* name : {"a", "b", "c", "d", "e"}) {
    const absl::Status status = file->Tensor(name).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_TRUE(Contains(status.message(), "dtype: expected one of F64"));
  }
}

TEST(SafetensorsTest, KeysOfANewerFormatAreSkipped) {
  const std::string bytes = SafetensorsBytes(
      R"({"a":{"dtype":"U8","new":{"shape":[{"x":[1,[2]]}],"dtype":3},"shape":[2],
               "newer":[[],{}],"newest":null,"data_offsets":[0,2]}})",
      2);
  const auto header = ParseSafetensorsHeader(bytes, bytes.size(), "f");
  ASSERT_TRUE(header.ok()) << header.status();
  EXPECT_EQ(header->entries.at(0).shape, std::vector<int64_t>{2});
}

TEST(SafetensorsTest, AMissingTensorNamesSimilarOnes) {
  const TemporaryFolder folder;
  const OwnedTensor q = MakeTensor("model.q_proj.weight", v1::DATA_TYPE_U8, {1});
  const OwnedTensor k = MakeTensor("lm_head", v1::DATA_TYPE_U8, {1});
  ASSERT_TRUE(WriteSafetensors(folder.Path("f"), {k.View(), q.View()}).ok());
  const auto file = SafetensorsFile::Open(folder.Path("f"));
  ASSERT_TRUE(file.ok());
  const absl::Status status = file->Tensor("model.v_proj.weight").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(
      Contains(status.message(), "it holds 2, for example \"model.q_proj.weight\", \"lm_head\""));
}

TEST(SafetensorsTest, PathsThatAreNoFiles) {
  const TemporaryFolder folder;
  EXPECT_EQ(SafetensorsFile::Open(folder.Path("none")).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(SafetensorsFile::Open(folder.Path("")).status().code(),
            absl::StatusCode::kInvalidArgument);
  WriteFile(folder.Path("empty"), "");
  EXPECT_TRUE(Contains(SafetensorsFile::Open(folder.Path("empty")).status().message(),
                       "header length: expected 8 bytes"));
}

TEST(SafetensorsTest, WriterRejectsWhatReadersWould) {
  const TemporaryFolder folder;
  const std::string path = folder.Path("f");
  const OwnedTensor good = MakeTensor("t", v1::DATA_TYPE_U8, {2});
  const auto rejected = [&path](const std::vector<TensorView>& tensors,
                                const std::map<std::string, std::string>& metadata = {}) {
    return absl::IsInvalidArgument(WriteSafetensors(path, tensors, metadata));
  };
  EXPECT_TRUE(rejected({good.View(), good.View()}));
  TensorView view = good.View();
  view.name = "";
  EXPECT_TRUE(rejected({view}));
  view.name = "__metadata__";
  EXPECT_TRUE(rejected({view}));
  view.name = "\xff";
  EXPECT_TRUE(rejected({view}));
  view = good.View();
  view.shape = {3};
  EXPECT_TRUE(rejected({view}));
  view.shape = {-2, -1};
  EXPECT_TRUE(rejected({view}));
  view = good.View();
  view.dtype = v1::DATA_TYPE_UNSPECIFIED;
  EXPECT_TRUE(rejected({view}));
  EXPECT_TRUE(rejected({good.View()}, {{"k", "\xff"}}));
  EXPECT_TRUE(folder.Names().empty());
}

TEST(SafetensorsTest, DataStartsAtAMultipleOfEight) {
  for (size_t length = 1; length < 10; ++length) {
    const OwnedTensor tensor = MakeTensor(std::string(length, 'n'), v1::DATA_TYPE_U8, {1});
    const auto header = SerializeSafetensorsHeader({tensor.View()}, {});
    ASSERT_TRUE(header.ok());
    EXPECT_EQ(header->size() % 8, 0);
  }
}

}  // namespace
}  // namespace certiq
