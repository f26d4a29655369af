#include "contract/check_message.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/unknown_field_set.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

absl::Status CheckText(const std::string& field, const std::string& text) {
  if (text.size() <= kMaxTextBytes) return absl::OkStatus();
  return base::InvalidField(field, absl::StrCat("expected at most ", kMaxTextBytes, " bytes, got ",
                                                text.size(), " bytes"));
}

absl::Status Check(const Message& message, const std::string& path) {
  const Reflection& reflection = *message.GetReflection();
  const auto& unknown = reflection.GetUnknownFields(message);
  if (!unknown.empty()) {
    return base::InvalidField(
        absl::StrCat(path, unknown.field(0).number()),
        absl::StrCat("expected a field that this server knows, got field number ",
                     unknown.field(0).number(), " of ", message.GetDescriptor()->full_name()));
  }
  std::vector<const FieldDescriptor*> fields;
  reflection.ListFields(message, &fields);
  for (const FieldDescriptor* const field : fields) {
    // What a header says is named without it, as the contract does.
    const bool header = path.empty() && field->name() == "header";
    const std::string name = header ? "" : absl::StrCat(path, field->name());
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      const std::string below = header ? "" : absl::StrCat(name, ".");
      if (field->is_repeated()) {
        for (int i = 0; i < reflection.FieldSize(message, field); ++i) {
          RETURN_IF_ERROR(Check(reflection.GetRepeatedMessage(message, field, i), below));
        }
      } else {
        RETURN_IF_ERROR(Check(reflection.GetMessage(message, field), below));
      }
    } else if (field->type() == FieldDescriptor::TYPE_STRING) {
      std::string scratch;
      if (field->is_repeated()) {
        for (int i = 0; i < reflection.FieldSize(message, field); ++i) {
          RETURN_IF_ERROR(
              CheckText(name, reflection.GetRepeatedStringReference(message, field, i, &scratch)));
        }
      } else {
        RETURN_IF_ERROR(CheckText(name, reflection.GetStringReference(message, field, &scratch)));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckMessage(const Message& message) { return Check(message, ""); }

}  // namespace certiq::server
