#include "contract/loads_in.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "certiq/v1/readers_table.h"
#include "contract/enums.h"

namespace certiq::server {
namespace {

// Whether a list of the table, words separated by spaces, has the value, or has no condition.
bool Takes(absl::string_view list, absl::string_view value) {
  if (list == "any") return true;
  const std::vector<absl::string_view> values = absl::StrSplit(list, ' ');
  return std::find(values.begin(), values.end(), value) != values.end();
}

// "gptq_v2" for FORMAT_GPTQ_V2.
std::string NameOf(engine::Format format) {
  const std::string name = v1::Format_Name(ToWire(format, kFormats));
  return absl::AsciiStrToLower(absl::StripPrefix(name, "FORMAT_"));
}

}  // namespace

std::vector<v1::Reader> LoadsIn(const engine::ResolvedSpec& spec) {
  const bool reordered = spec.group_size != 0 && spec.order != engine::Order::kNatural &&
                         spec.group_scales == engine::GroupScales::kDynamic;
  std::vector<v1::Reader> readers;
  for (const v1::ReaderLine& line : v1::kReaderLines) {
    if (!Takes(line.formats, NameOf(spec.format)) || !Takes(line.bits, absl::StrCat(spec.bits)) ||
        !Takes(line.grids, spec.symmetric ? "symmetric" : "asymmetric") ||
        !Takes(line.group_sizes, absl::StrCat(spec.group_size)) ||
        !Takes(line.group_order, reordered ? "reordered" : "columns")) {
      continue;
    }
    v1::Reader& reader = readers.emplace_back();
    reader.set_name(line.reader);
    reader.set_versions(line.versions);
    reader.set_checked(line.checked);
    reader.set_note(line.note);
  }
  return readers;
}

}  // namespace certiq::server
