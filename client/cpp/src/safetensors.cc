#include "certiq/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"

namespace certiq {
namespace {

constexpr char kMetadataKey[] = "__metadata__";

// A few names that help to see what the file holds, the most similar first.
std::string SomeNames(const std::vector<SafetensorsEntry>& entries, absl::string_view wanted) {
  constexpr size_t kShown = 4;
  std::vector<std::pair<size_t, const std::string*>> ranked;
  ranked.reserve(entries.size());
  for (const SafetensorsEntry& entry : entries) {
    // Common beginning and common end: cheap, and right for dotted names.
    const std::string& name = entry.name;
    const size_t shorter = std::min(name.size(), wanted.size());
    size_t front = 0;
    while (front < shorter && name[front] == wanted[front]) ++front;
    size_t back = 0;
    while (back + front < shorter &&
           name[name.size() - 1 - back] == wanted[wanted.size() - 1 - back])
      ++back;
    ranked.emplace_back(front + back, &name);
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  if (ranked.size() > kShown) ranked.resize(kShown);
  return absl::StrJoin(ranked, ", ", [](std::string* out, const auto& item) {
    absl::StrAppend(out, "\"", *item.second, "\"");
  });
}

}  // namespace

void SafetensorsFile::Unmapper::operator()(const char* begin) const {
  munmap(const_cast<char*>(begin), bytes);
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat(path, ": cannot be opened"));
  // The mapping stays valid without the descriptor.
  const absl::Cleanup close_fd = [fd] { close(fd); };
  struct stat info = {};
  if (fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, path);
  if (!S_ISREG(info.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": expected a regular file"));
  }
  SafetensorsFile file;
  file.path_ = path;
  const auto size = static_cast<size_t>(info.st_size);
  if (size > 0) {
    void* const begin = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (begin == MAP_FAILED) return absl::ErrnoToStatus(errno, absl::StrCat(path, ": mapping"));
    file.mapping_ =
        std::unique_ptr<const char, Unmapper>(static_cast<const char*>(begin), Unmapper(size));
  }
  ASSIGN_OR_RETURN(file.header_, ParseSafetensorsHeader(
                                     absl::string_view(file.mapping_.get(), size), size, path));
  return file;
}

absl::StatusOr<TensorView> SafetensorsFile::Tensor(absl::string_view name) const {
  const auto& all = header_.entries;
  const auto entry = std::find_if(all.begin(), all.end(),
                                  [name](const SafetensorsEntry& e) { return e.name == name; });
  if (entry == all.end()) {
    return absl::NotFoundError(absl::StrCat(
        path_, ": no tensor \"", name, "\"",
        all.empty()
            ? std::string("; the file holds none")
            : absl::StrCat("; it holds ", all.size(), ", for example ", SomeNames(all, name))));
  }
  TensorView view;
  view.name = entry->name;
  view.dtype = DataTypeFromName(entry->dtype);
  if (view.dtype == v1::DATA_TYPE_UNSPECIFIED) {
    return absl::InvalidArgumentError(absl::StrCat(
        path_, ": tensor \"", name,
        "\": dtype: expected one of F64, F32, F16, BF16, I64, I32, U8, got ", entry->dtype));
  }
  view.shape = entry->shape;
  view.data = absl::string_view(mapping_.get() + header_.data_offset + entry->begin,
                                entry->end - entry->begin);
  return view;
}

absl::StatusOr<std::string> SerializeSafetensorsHeader(
    absl::Span<const TensorView> tensors, const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json[kMetadataKey] = metadata;
  std::set<std::string> names;
  uint64_t position = 0;
  for (const TensorView& tensor : tensors) {
    const std::string at = absl::StrCat("tensor \"", tensor.name, "\": ");
    if (tensor.name.empty() || tensor.name == kMetadataKey) {
      return absl::InvalidArgumentError(
          absl::StrCat(at, "name: expected neither \"\" nor \"", kMetadataKey, "\""));
    }
    if (!names.insert(tensor.name).second) {
      return absl::InvalidArgumentError(absl::StrCat(at, "name: expected every name once"));
    }
    const absl::StatusOr<int64_t> bytes = TensorBytes(tensor.dtype, tensor.shape);
    if (!bytes.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(at, bytes.status().message()));
    }
    if (static_cast<uint64_t>(*bytes) != tensor.data.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(at, "data: expected ", *bytes, " bytes for ", DataTypeName(tensor.dtype),
                       " ", ShapeText(tensor.shape), ", got ", tensor.data.size()));
    }
    const uint64_t end = position + tensor.data.size();
    json[tensor.name] = {{"dtype", DataTypeName(tensor.dtype)},
                         {"shape", tensor.shape},
                         {"data_offsets", {position, end}}};
    position = end;
  }
  std::string text;
  try {
    text = json.dump();
  } catch (const nlohmann::json::exception&) {
    return absl::InvalidArgumentError("header: expected names and metadata in UTF-8");
  }
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  if (length > kMaxSafetensorsHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "header: expected at most ", kMaxSafetensorsHeaderBytes, " bytes, got ", length));
  }
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + text;
}

absl::StatusOr<AtomicFile> StageSafetensors(const std::string& path,
                                            absl::Span<const TensorView> tensors,
                                            const std::map<std::string, std::string>& metadata) {
  std::vector<TensorView> ordered(tensors.begin(), tensors.end());
  std::stable_sort(ordered.begin(), ordered.end(), [](const TensorView& a, const TensorView& b) {
    return DataTypeBytes(a.dtype) > DataTypeBytes(b.dtype);
  });
  const absl::StatusOr<std::string> header = SerializeSafetensorsHeader(ordered, metadata);
  if (!header.ok()) {
    return absl::Status(header.status().code(),
                        absl::StrCat(path, ": ", header.status().message()));
  }
  ASSIGN_OR_RETURN(AtomicFile file, AtomicFile::Create(path));
  RETURN_IF_ERROR(file.Write(*header));
  for (const TensorView& tensor : ordered) {
    RETURN_IF_ERROR(file.Write(tensor.data));
  }
  RETURN_IF_ERROR(file.Flush());
  return file;
}

absl::Status WriteSafetensors(const std::string& path, absl::Span<const TensorView> tensors,
                              const std::map<std::string, std::string>& metadata) {
  absl::StatusOr<AtomicFile> file = StageSafetensors(path, tensors, metadata);
  return file.ok() ? file->Commit() : file.status();
}

}  // namespace certiq
