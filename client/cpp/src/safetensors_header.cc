// The header parser. It is a SAX handler, so that a malicious header costs no tree in memory,
// duplicate keys are seen, and 64-bit integers stay exact.
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "certiq/safetensors.h"
#include "nlohmann/json.hpp"

namespace certiq {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are used as they lie in files");

constexpr uint64_t kLengthBytes = 8;
constexpr absl::string_view kMetadataKey = "__metadata__";

// Bits of an element of every dtype the format defines; the small ones share bytes.
std::optional<uint64_t> ElementBits(absl::string_view dtype) {
  static constexpr std::array<std::pair<absl::string_view, uint64_t>, 20> kBits = {{
      {"F64", 64},    {"F32", 32},    {"F16", 16},    {"BF16", 16},   {"I64", 64},
      {"I32", 32},    {"I16", 16},    {"I8", 8},      {"U64", 64},    {"U32", 32},
      {"U16", 16},    {"U8", 8},      {"BOOL", 8},    {"F8_E4M3", 8}, {"F8_E5M2", 8},
      {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},      {"C64", 64},
  }};
  for (const auto& [name, bits] : kBits) {
    if (name == dtype) return bits;
  }
  return std::nullopt;
}

// Types of a newer release of the format look like this; anything else is a mistake.
bool LooksLikeDtype(absl::string_view dtype) {
  if (dtype.empty() || dtype.size() > 32 || !absl::ascii_isupper(dtype.front())) return false;
  return std::all_of(dtype.begin(), dtype.end(), [](unsigned char c) {
    return absl::ascii_isupper(c) || absl::ascii_isdigit(c) || c == '_';
  });
}

std::string Quoted(absl::string_view text) {
  constexpr size_t kLongest = 80;
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(text.substr(0, kLongest)),
                      text.size() > kLongest ? "…\"" : "\"");
}

// nlohmann's SAX interface; every callback returns whether to go on, and the first error stays.
class HeaderHandler {
 public:
  using number_integer_t = nlohmann::json::number_integer_t;
  using number_unsigned_t = nlohmann::json::number_unsigned_t;
  using number_float_t = nlohmann::json::number_float_t;
  using string_t = nlohmann::json::string_t;
  using binary_t = nlohmann::json::binary_t;

  SafetensorsHeader TakeHeader() { return std::move(header_); }
  // Without file and position; empty if there was none.
  const std::string& error() const { return error_; }

  // The names are nlohmann's. NOLINTBEGIN(readability-identifier-naming)
  bool null() { return Scalar("null"); }
  bool boolean(bool value) { return Scalar(value ? "true" : "false"); }
  bool number_float(number_float_t, const string_t& text) { return Scalar(text); }
  bool binary(binary_t&) { return Scalar("binary data"); }
  bool number_integer(number_integer_t value) { return Scalar(absl::StrCat(value)); }

  bool number_unsigned(number_unsigned_t value) {
    if (where_ == Where::kShape) {
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return Scalar(absl::StrCat(value));
      }
      entry_.shape.push_back(static_cast<int64_t>(value));
      return true;
    }
    if (where_ == Where::kOffsets) {
      if (offsets_.size() == 2) return Fail("data_offsets", "[begin, end]", "a third number");
      offsets_.push_back(value);
      return true;
    }
    return Scalar(absl::StrCat(value));
  }

  bool string(string_t& value) {
    if (where_ == Where::kMetadata) {
      header_.metadata[key_] = std::move(value);
      return true;
    }
    if (where_ == Where::kTensor && key_ == "dtype") {
      if (!LooksLikeDtype(value)) {
        return Fail("dtype", "a safetensors dtype such as F32", Quoted(value));
      }
      entry_.dtype = std::move(value);
      return true;
    }
    return Scalar(Quoted(value));
  }

  bool start_object(std::size_t) {
    switch (where_) {
      case Where::kOutside:
        where_ = Where::kTop;
        return true;
      case Where::kTop:
        if (key_ == kMetadataKey) {
          where_ = Where::kMetadata;
        } else {
          entry_ = SafetensorsEntry();
          entry_.name = key_;
          where_ = Where::kTensor;
        }
        keys_.clear();
        return true;
      default:
        return Nested("an object");
    }
  }

  bool key(string_t& value) {
    if (where_ == Where::kIgnored) return true;
    std::set<std::string>& seen = where_ == Where::kTop ? names_ : keys_;
    if (!seen.insert(value).second) {
      return where_ == Where::kTop ? FailTop("every tensor once", Quoted(value) + " twice")
                                   : Fail(value, "every key once", "it twice");
    }
    if (where_ == Where::kTop && value.empty()) return FailTop("a name", "an empty tensor name");
    key_ = std::move(value);
    return true;
  }

  bool end_object() {
    if (where_ == Where::kIgnored) return Leave();
    if (where_ == Where::kTensor) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        if (!keys_.contains(field)) return Fail(field, "a value", "nothing");
      }
      header_.entries.push_back(std::move(entry_));
    }
    where_ = where_ == Where::kTop ? Where::kOutside : Where::kTop;
    return true;
  }

  bool start_array(std::size_t) {
    if (where_ == Where::kTensor && key_ == "shape") {
      where_ = Where::kShape;
      return true;
    }
    if (where_ == Where::kTensor && key_ == "data_offsets") {
      where_ = Where::kOffsets;
      offsets_.clear();
      return true;
    }
    return Nested("an array");
  }

  bool end_array() {
    if (where_ == Where::kIgnored) return Leave();
    if (where_ == Where::kOffsets) {
      if (offsets_.size() != 2) {
        return Fail("data_offsets", "[begin, end]", absl::StrCat(offsets_.size(), " numbers"));
      }
      entry_.begin = offsets_[0];
      entry_.end = offsets_[1];
    }
    where_ = Where::kTensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) {
    if (error_.empty()) {
      error_ = absl::StrCat("header: expected valid JSON, got an error at its byte ", position);
    }
    return false;
  }
  // NOLINTEND(readability-identifier-naming)

 private:
  enum class Where { kOutside, kTop, kTensor, kShape, kOffsets, kMetadata, kIgnored };

  // A value where no other callback took one.
  bool Scalar(absl::string_view got) {
    switch (where_) {
      case Where::kOutside:
        return FailTop("a JSON object", got);
      case Where::kTop:
        return FailTop(absl::StrCat("an object for ", Quoted(key_)), got);
      case Where::kMetadata:
        return FailTop(absl::StrCat("a string for __metadata__ key ", Quoted(key_)), got);
      case Where::kShape:
        return Fail("shape", "integers from 0 to 2^63 - 1", got);
      case Where::kOffsets:
        return Fail("data_offsets", "two integers from 0 to 2^64 - 1", got);
      case Where::kTensor:
        if (key_ == "dtype") return Fail("dtype", "a string", got);
        if (key_ == "shape" || key_ == "data_offsets") return Fail(key_, "an array", got);
        return true;  // A key of a newer release of the format.
      case Where::kIgnored:
        return true;
    }
    return false;
  }

  bool Nested(const char* what) {
    const bool known = key_ == "dtype" || key_ == "shape" || key_ == "data_offsets";
    if (where_ != Where::kIgnored && (where_ != Where::kTensor || known)) return Scalar(what);
    where_ = Where::kIgnored;
    ++ignored_depth_;
    return true;
  }

  bool Leave() {
    if (--ignored_depth_ == 0) where_ = Where::kTensor;
    return true;
  }

  bool Fail(absl::string_view field, absl::string_view expected, absl::string_view got) {
    if (where_ == Where::kMetadata) {
      return FailTop(absl::StrCat(expected, " in __metadata__"),
                     absl::StrCat(Quoted(field), ": ", got));
    }
    error_ = absl::StrCat("tensor ", Quoted(entry_.name), ": ", field, ": expected ", expected,
                          ", got ", got);
    return false;
  }

  bool FailTop(absl::string_view expected, absl::string_view got) {
    error_ = absl::StrCat("header: expected ", expected, ", got ", got);
    return false;
  }

  Where where_ = Where::kOutside;
  int64_t ignored_depth_ = 0;
  std::string key_;
  std::set<std::string> names_;
  std::set<std::string> keys_;
  std::vector<uint64_t> offsets_;
  SafetensorsEntry entry_;
  SafetensorsHeader header_;
  std::string error_;
};

absl::Status CheckEntry(const SafetensorsEntry& entry, uint64_t data_bytes) {
  const auto error = [&entry](absl::string_view field, absl::string_view expected,
                              absl::string_view got) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(entry.name), ": ", field,
                                                   ": expected ", expected, ", got ", got));
  };
  const std::string offsets = absl::StrCat("[", entry.begin, ", ", entry.end, "]");
  if (entry.begin > entry.end) return error("data_offsets", "begin <= end", offsets);
  if (entry.end > data_bytes) {
    return error("data_offsets", absl::StrCat("an end within the ", data_bytes, " bytes of data"),
                 offsets);
  }
  uint64_t elements = 1;
  bool overflow = false;
  for (const int64_t dimension : entry.shape) {
    overflow |= __builtin_mul_overflow(elements, static_cast<uint64_t>(dimension), &elements);
  }
  const std::optional<uint64_t> bits = ElementBits(entry.dtype);
  uint64_t total_bits = 0;
  overflow |= __builtin_mul_overflow(elements, bits.value_or(1), &total_bits);
  if (overflow) {
    return error("shape", "a size that 64 bits hold", ShapeText(entry.shape));
  }
  if (!bits.has_value()) return absl::OkStatus();
  if (total_bits % 8 != 0 || total_bits / 8 != entry.end - entry.begin) {
    return error(
        "data_offsets",
        absl::StrCat((total_bits + 7) / 8, " bytes for ", entry.dtype, " ", ShapeText(entry.shape)),
        absl::StrCat(entry.end - entry.begin, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status CheckCoverage(std::vector<SafetensorsEntry>& entries, uint64_t data_bytes) {
  std::sort(entries.begin(), entries.end(),
            [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
              return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
            });
  uint64_t position = 0;
  const SafetensorsEntry* previous = nullptr;
  for (const SafetensorsEntry& entry : entries) {
    if (entry.begin != position) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor ", Quoted(entry.name), ": data_offsets: expected ", position, ", ",
          previous == nullptr ? std::string("the beginning of the data")
                              : absl::StrCat("where ", Quoted(previous->name), " ends"),
          ", got begin ", entry.begin, entry.begin < position ? " (overlap)" : " (hole)"));
    }
    position = entry.end;
    previous = &entry;
  }
  if (position != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "data: expected ", position, " bytes as the header describes, got ", data_bytes));
  }
  return absl::OkStatus();
}

absl::Status InFile(absl::string_view file, absl::string_view message) {
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", message));
}

}  // namespace

absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(absl::string_view bytes,
                                                         uint64_t file_bytes,
                                                         absl::string_view file) {
  if (file_bytes < kLengthBytes || bytes.size() < kLengthBytes) {
    return InFile(file, absl::StrCat("header length: expected 8 bytes, got a file of ",
                                     std::min<uint64_t>(file_bytes, bytes.size())));
  }
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), kLengthBytes);
  if (length == 0 || length > kMaxSafetensorsHeaderBytes) {
    return InFile(file, absl::StrCat("header length: expected 1 to ", kMaxSafetensorsHeaderBytes,
                                     " bytes, got ", length));
  }
  if (length > file_bytes - kLengthBytes || length > bytes.size() - kLengthBytes) {
    return InFile(file, absl::StrCat("header length: expected at most the ",
                                     std::min<uint64_t>(file_bytes, bytes.size()) - kLengthBytes,
                                     " bytes that follow it, got ", length, " (truncated?)"));
  }
  const absl::string_view json = bytes.substr(kLengthBytes, length);
  if (json.front() != '{') {
    return InFile(file, absl::StrCat("header: expected a JSON object, got ",
                                     Quoted(json.substr(0, 1)), " as its first byte"));
  }
  // nlohmann takes a zero for the end of its input and would not look at what follows.
  if (const size_t zero = json.find('\0'); zero != absl::string_view::npos) {
    return InFile(file, absl::StrCat("header: expected valid JSON, got a zero at its byte ", zero));
  }
  HeaderHandler handler;
  const bool parsed = nlohmann::json::sax_parse(json.begin(), json.end(), &handler);
  if (!parsed || !handler.error().empty()) {
    return InFile(file, handler.error().empty() ? "header: expected valid JSON" : handler.error());
  }
  SafetensorsHeader header = handler.TakeHeader();
  header.data_offset = kLengthBytes + length;
  const uint64_t data_bytes = file_bytes - header.data_offset;
  for (const SafetensorsEntry& entry : header.entries) {
    const absl::Status status = CheckEntry(entry, data_bytes);
    if (!status.ok()) return InFile(file, status.message());
  }
  const absl::Status status = CheckCoverage(header.entries, data_bytes);
  if (!status.ok()) return InFile(file, status.message());
  return header;
}

}  // namespace certiq
