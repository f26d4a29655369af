#include "certiq/statistics.h"

#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "certiq/status.h"

namespace certiq {
namespace {

constexpr char kTokensKey[] = "certiq.tokens";
constexpr char kPortionKey[] = "certiq.portion";
constexpr char kKindKey[] = "certiq.kind";

absl::Status Invalid(absl::string_view field, absl::string_view description) {
  return FieldError(absl::StatusCode::kInvalidArgument, field, description);
}

// N where `elements` are an upper triangle of N x N; 0 where they are none.
int64_t TriangleSide(int64_t elements) {
  const auto guess = static_cast<int64_t>(std::sqrt(2 * static_cast<double>(elements)));
  for (int64_t n = std::max<int64_t>(1, guess - 2); n <= guess + 2; ++n) {
    if (n * (n + 1) / 2 == elements) return n;
  }
  return 0;
}

absl::Status CheckSum(absl::string_view field, const TensorView& tensor,
                      const StatisticsShape& shape, bool symmetric) {
  const int64_t n = shape.features;
  const std::vector<int64_t> expected = symmetric && shape.layout == v1::MATRIX_LAYOUT_UPPER
                                            ? std::vector<int64_t>{n * (n + 1) / 2}
                                            : std::vector<int64_t>{n, n};
  if (tensor.shape != expected || tensor.dtype != shape.dtype) {
    return Invalid(
        field, absl::StrCat("expected ", DataTypeName(shape.dtype), " ", ShapeText(expected),
                            ", got ", DataTypeName(tensor.dtype), " ", ShapeText(tensor.shape)));
  }
  const absl::StatusOr<int64_t> bytes = TensorBytes(tensor.dtype, tensor.shape);
  if (!bytes.ok()) return Invalid(field, bytes.status().message());
  if (static_cast<uint64_t>(*bytes) != tensor.data.size()) {
    return Invalid(field, absl::StrCat("expected ", *bytes, " bytes, got ", tensor.data.size()));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<StatisticsShape> ShapeOf(const StatisticsView& statistics) {
  StatisticsShape shape;
  const TensorView& gram = statistics.gram;
  shape.dtype = gram.dtype;
  if (gram.dtype != v1::DATA_TYPE_F64 && gram.dtype != v1::DATA_TYPE_F32) {
    return Invalid("gram", absl::StrCat("expected F64 or F32, got ", DataTypeName(gram.dtype)));
  }
  if (gram.shape.size() == 1) {
    shape.layout = v1::MATRIX_LAYOUT_UPPER;
    shape.features =
        gram.shape[0] > 0 && gram.shape[0] < int64_t{1} << 52 ? TriangleSide(gram.shape[0]) : 0;
  } else if (gram.shape.size() == 2 && gram.shape[0] == gram.shape[1]) {
    shape.features = gram.shape[0];
  }
  if (shape.features < 1) {
    return Invalid("gram", absl::StrCat("expected [N, N] or the [N (N + 1) / 2] of an upper "
                                        "triangle, got ",
                                        ShapeText(gram.shape)));
  }
  RETURN_IF_ERROR(CheckSum("gram", gram, shape, true));
  if (statistics.gram_quantized.has_value() != statistics.cross.has_value()) {
    return Invalid("gram_quantized, cross", "expected both or none");
  }
  if (!statistics.cross.has_value()) return shape;
  shape.kind = v1::CALIBRATION_KIND_MISMATCHED;
  RETURN_IF_ERROR(CheckSum("gram_quantized", *statistics.gram_quantized, shape, true));
  RETURN_IF_ERROR(CheckSum("cross", *statistics.cross, shape, false));
  return shape;
}

StatisticsView Statistics::View() const {
  StatisticsView view{.tokens = tokens, .portion = portion, .gram = gram.View()};
  if (gram_quantized.has_value()) view.gram_quantized = gram_quantized->View();
  if (cross.has_value()) view.cross = cross->View();
  return view;
}

absl::StatusOr<AtomicFile> StageStatistics(const std::string& path,
                                           const StatisticsView& statistics) {
  RETURN_IF_ERROR(ShapeOf(statistics).status());
  const StatisticsNames names;
  std::vector<TensorView> tensors = {statistics.gram};
  tensors.back().name = names.gram;
  const bool mismatched = statistics.cross.has_value();
  if (mismatched) {
    tensors.push_back(*statistics.gram_quantized);
    tensors.back().name = "gram_quantized";
    tensors.push_back(*statistics.cross);
    tensors.back().name = "cross";
  }
  return StageSafetensors(
      path, tensors,
      {{kTokensKey, absl::StrCat(statistics.tokens)},
       {kPortionKey, statistics.portion == v1::PORTION_HELD_OUT ? "held_out" : "fit"},
       {kKindKey, mismatched ? "mismatched" : "matched"}});
}

absl::StatusOr<StatisticsMetadata> ReadStatisticsMetadata(const SafetensorsFile& file) {
  StatisticsMetadata metadata;
  const auto text = [&file](const char* key) -> const std::string* {
    const auto found = file.metadata().find(key);
    return found == file.metadata().end() ? nullptr : &found->second;
  };
  const auto broken = [&file](const char* key, const char* expected, const std::string& got) {
    return absl::InvalidArgumentError(absl::StrCat(file.path(), ": metadata ", key, ": expected ",
                                                   expected, ", got \"", got, "\""));
  };
  if (const std::string* const tokens = text(kTokensKey); tokens != nullptr) {
    int64_t value = 0;
    if (!absl::SimpleAtoi(*tokens, &value) || value < 0) {
      return broken(kTokensKey, "a number of tokens", *tokens);
    }
    metadata.tokens = value;
  }
  if (const std::string* const portion = text(kPortionKey); portion != nullptr) {
    if (*portion != "fit" && *portion != "held_out") {
      return broken(kPortionKey, "fit or held_out", *portion);
    }
    metadata.portion = *portion == "fit" ? v1::PORTION_FIT : v1::PORTION_HELD_OUT;
  }
  if (const std::string* const kind = text(kKindKey); kind != nullptr) {
    if (*kind != "matched" && *kind != "mismatched") {
      return broken(kKindKey, "matched or mismatched", *kind);
    }
    metadata.mismatched = *kind == "mismatched";
  }
  return metadata;
}

absl::StatusOr<StatisticsView> ReadStatistics(const SafetensorsFile& file,
                                              const StatisticsNames& names) {
  StatisticsView view;
  ASSIGN_OR_RETURN(view.gram, file.Tensor(names.gram));
  if (!names.gram_quantized.empty()) {
    ASSIGN_OR_RETURN(view.gram_quantized, file.Tensor(names.gram_quantized));
  }
  if (!names.cross.empty()) {
    ASSIGN_OR_RETURN(view.cross, file.Tensor(names.cross));
  }
  return view;
}

}  // namespace certiq
