// Header parser of safetensors files against arbitrary bytes.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "absl/strings/string_view.h"
#include "certiq/safetensors.h"

namespace {

// What a caller relies on once a header was accepted.
void CheckAccepted(const certiq::SafetensorsHeader& header, uint64_t file_bytes) {
  uint64_t position = 0;
  for (const certiq::SafetensorsEntry& entry : header.entries) {
    if (entry.name.empty() || entry.begin != position || entry.end < entry.begin) std::abort();
    for (const int64_t dimension : entry.shape) {
      if (dimension < 0) std::abort();
    }
    const certiq::v1::DataType dtype = certiq::DataTypeFromName(entry.dtype);
    if (dtype != certiq::v1::DATA_TYPE_UNSPECIFIED) {
      const auto bytes = certiq::TensorBytes(dtype, entry.shape);
      if (!bytes.ok() || static_cast<uint64_t>(*bytes) != entry.end - entry.begin) std::abort();
    }
    position = entry.end;
  }
  if (header.data_offset + position != file_bytes) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view bytes(reinterpret_cast<const char*>(data), size);
  const auto whole = certiq::ParseSafetensorsHeader(bytes, size, "fuzz");
  if (whole.ok()) CheckAccepted(*whole, size);
  // A file of which only the beginning is at hand: its first byte says how much longer it is.
  if (size > 0) {
    const uint64_t file_bytes = size + (uint64_t{1} << (data[0] % 64)) - 1;
    const auto part = certiq::ParseSafetensorsHeader(bytes, file_bytes, "fuzz");
    if (part.ok()) CheckAccepted(*part, file_bytes);
  }
  return 0;
}
