// Safetensors files: 8 bytes of header length (little-endian), a JSON header, then the tensors'
// bytes without gaps.
#ifndef CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_SAFETENSORS_H_
#define CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "certiq/atomic_file.h"
#include "certiq/tensor.h"

namespace certiq {

// The longest header that is read or written, as in the reference implementation.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

// One tensor as the header describes it. dtype is the file's own name: it may be one that
// certiq does not know ("I16", "BOOL", "F8_E4M3"), whose shape is then only size-checked where
// its size is known.
struct SafetensorsEntry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  // Bytes from the end of the header: [begin, end).
  uint64_t begin = 0;
  uint64_t end = 0;
};

// A checked header. Entries lie in the order of their bytes, which they cover exactly.
struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;
  // Where the tensors' bytes begin in the file.
  uint64_t data_offset = 0;
};

// Checks and reads a header. `bytes` is the file from its first byte on, at least up to the end
// of the header (fewer: rejected as truncated); `file_bytes` is the size of the whole file; `file`
// is only named in errors. Touches nothing but its arguments.
// INVALID_ARGUMENT, naming file, tensor and field, what was expected and what came, where the
// format is violated.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view bytes,
                                                         uint64_t file_bytes,
                                                         absl::string_view file);

// A file mapped into memory. Const methods are safe to call from several threads. The file must
// not be truncated by others while it is mapped: the system would end the process (SIGBUS).
// Replacing it by rename, as WriteSafetensors does, is fine.
class SafetensorsFile {
 public:
  // NOT_FOUND, PERMISSION_DENIED, … for a file that cannot be opened; INVALID_ARGUMENT for one
  // that is not a regular file or is malformed.
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);

  SafetensorsFile(SafetensorsFile&&) = default;
  SafetensorsFile& operator=(SafetensorsFile&&) = default;

  const std::string& path() const { return path_; }
  const std::vector<SafetensorsEntry>& entries() const { return header_.entries; }
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }

  // The tensor without a copy: the view is valid as long as this object, also after a move.
  // NOT_FOUND (naming some that exist), INVALID_ARGUMENT for a dtype certiq does not know.
  absl::StatusOr<TensorView> Tensor(absl::string_view name) const;

 private:
  struct Unmapper {
    // A default member initializer would not be complete where unique_ptr needs it.
    Unmapper() : bytes(0) {}
    explicit Unmapper(size_t size) : bytes(size) {}
    size_t bytes;
    void operator()(const char* begin) const;
  };
  SafetensorsFile() = default;

  std::string path_;
  std::unique_ptr<const char, Unmapper> mapping_;
  SafetensorsHeader header_;
};

// Serializes the length and the header of a file of these tensors, in this order. The data that
// follows starts at a multiple of 8 bytes.
// INVALID_ARGUMENT: an empty, repeated or reserved name, a size that does not fit the shape, text
// that is not UTF-8, a header over kMaxSafetensorsHeaderBytes.
absl::StatusOr<std::string> SerializeSafetensorsHeader(
    absl::Span<const TensorView> tensors, const std::map<std::string, std::string>& metadata);

// Writes everything to disk beside `path` and leaves the rename, Commit(), to the caller, who may
// have several files to finish together. Larger elements come first, so that every tensor is
// aligned to its element. Errors as SerializeSafetensorsHeader and AtomicFile.
absl::StatusOr<AtomicFile> StageSafetensors(
    const std::string& path, absl::Span<const TensorView> tensors,
    const std::map<std::string, std::string>& metadata = {});

// StageSafetensors and Commit(): the file appears under its name complete or not at all.
absl::Status WriteSafetensors(const std::string& path, absl::Span<const TensorView> tensors,
                              const std::map<std::string, std::string>& metadata = {});

}  // namespace certiq

#endif  // CERTIQ_CLIENT_CPP_INCLUDE_CERTIQ_SAFETENSORS_H_
