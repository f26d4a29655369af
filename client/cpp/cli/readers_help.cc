#include "readers_help.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "certiq/v1/readers_table.h"

namespace certiq::cli {
namespace {

// ", bits 4 8", or nothing where there is no condition.
std::string Condition(absl::string_view label, absl::string_view list) {
  if (list == "any") return "";
  return absl::StrCat(", ", label, list);
}

}  // namespace

std::string ReadersText() {
  std::string text = "Who loads a result (a certificate's loads_in), as of the day given:\n";
  absl::string_view formats;
  for (const v1::ReaderLine& line : v1::kReaderLines) {
    if (formats != line.formats) absl::StrAppend(&text, "  ", line.formats, "\n");
    formats = line.formats;
    const absl::string_view note = line.note;
    const bool columns = absl::string_view(line.group_order) == "columns";
    absl::StrAppend(&text, "    ", line.reader, " ", line.versions, Condition("bits ", line.bits),
                    Condition("", line.grids), Condition("group_size ", line.group_sizes),
                    columns ? ", groups of neighbouring columns" : "", note.empty() ? "" : "; ",
                    note, " [", line.checked, "]\n");
  }
  return text;
}

}  // namespace certiq::cli
