// Any bytes as the file of a stored blob: what is read without an error was written that way.
#include <stdlib.h>  // NOLINT(modernize-deprecated-headers): mkdtemp
#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "store/blobs.h"
#include "store/disk.h"
#include "store/file_blobs.h"
#include "store/reserve.h"

namespace {

constexpr char kName[] = "0123456789abcdef0123456789abcdef";

// In memory where the machine has such a file system.
std::string MakeRoot() {
  for (std::string root : {"/dev/shm/certiq_fuzz_XXXXXX", "/tmp/certiq_fuzz_XXXXXX"}) {
    if (mkdtemp(root.data()) == nullptr) continue;
    if (mkdir((root + "/" + certiq::server::kBlobDirectory).c_str(), 0700) == 0) return root;
  }
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string root = MakeRoot();
  static const auto disk = std::make_shared<certiq::server::Disk>(root);
  static const auto blobs =
      certiq::server::MakeFileBlobs(disk, std::make_shared<certiq::server::DiskReserve>(disk));
  static const std::string path = root + "/" + certiq::server::kBlobDirectory + "/" + kName;
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  // The record's idea of the length: right for one block, and others near it.
  for (const int64_t bytes :
       {int64_t{-24}, int64_t{-16}, int64_t{0}, int64_t{1}, int64_t{1} << 40}) {
    const int64_t length = bytes < 0 ? static_cast<int64_t>(size) + bytes : bytes;
    if (length < 0) continue;
    certiq::server::BlobRef blob;
    blob.set_name(kName);
    blob.set_bytes(length);
    const auto reader = blobs->Open(blob);
    if (!reader.ok()) continue;
    if ((*reader)->bytes() != length) std::abort();
    std::vector<std::byte> all(static_cast<size_t>(length));
    static_cast<void>((*reader)->Read(0, all));
    if (length > 1) {
      static_cast<void>((*reader)->Read(length / 2, std::span(all).first(1)));
    }
  }
  return 0;
}
