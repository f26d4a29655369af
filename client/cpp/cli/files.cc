#include "files.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"
#include "certiq/safetensors.h"
#include "google/protobuf/util/json_util.h"

namespace certiq::cli {

std::string OutputName(const std::string& weight, const std::string& role) {
  if (role == "weight") return weight;
  return absl::StrCat(absl::StripSuffix(weight, ".weight"), ".", role);
}

absl::StatusOr<AtomicFile> StageResult(const std::string& path, const std::string& weight,
                                       const QuantizeResult& result) {
  std::vector<TensorView> tensors;
  tensors.reserve(result.tensors.size());
  for (const OwnedTensor& tensor : result.tensors) {
    tensors.push_back(tensor.View());
    tensors.back().name = OutputName(weight, tensor.name);
  }
  // Loaders of checkpoints ask for "format" and know "pt".
  return StageSafetensors(path, tensors, {{"format", "pt"}});
}

absl::StatusOr<std::string> JsonText(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = true;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string text;
  const auto status = google::protobuf::util::MessageToJsonString(message, &text, options);
  if (!status.ok()) {
    return absl::InternalError(
        absl::StrCat(message.GetTypeName(), " as JSON: ", status.ToString()));
  }
  if (text.empty() || text.back() != '\n') text += '\n';
  return text;
}

absl::StatusOr<std::string> ReportText(const v1::Certificate& certificate) {
  return JsonText(certificate);
}

absl::StatusOr<AtomicFile> StageReport(const std::string& path,
                                       const v1::Certificate& certificate) {
  ASSIGN_OR_RETURN(const std::string text, ReportText(certificate));
  ASSIGN_OR_RETURN(AtomicFile file, AtomicFile::Create(path));
  RETURN_IF_ERROR(file.Write(text));
  RETURN_IF_ERROR(file.Flush());
  return file;
}

}  // namespace certiq::cli
