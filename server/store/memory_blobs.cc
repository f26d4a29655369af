#include "store/memory_blobs.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "base/mutex.h"

namespace certiq::server {
namespace {

constexpr size_t kBlock = size_t{1} << 20;

// Bytes in blocks, so that growing neither copies nor holds twice the bytes.
struct BlockedBytes {
  std::vector<std::vector<std::byte>> blocks;
  int64_t size = 0;
};

class MemoryReader final : public BlobReader {
 public:
  explicit MemoryReader(std::shared_ptr<const BlockedBytes> bytes) : bytes_(std::move(bytes)) {}

  int64_t bytes() const override { return bytes_->size; }

  absl::Status Read(int64_t offset, std::span<std::byte> to) const override {
    auto at = static_cast<size_t>(offset);
    while (!to.empty()) {
      const std::vector<std::byte>& block = bytes_->blocks[at / kBlock];
      const size_t begin = at % kBlock;
      const size_t count = std::min(to.size(), block.size() - begin);
      std::copy_n(block.data() + begin, count, to.data());
      at += count;
      to = to.subspan(count);
    }
    return absl::OkStatus();
  }

 private:
  std::shared_ptr<const BlockedBytes> bytes_;
};

class MemoryBlobs final : public Blobs {
 public:
  absl::StatusOr<std::unique_ptr<BlobWriter>> Create() override;

  absl::StatusOr<std::unique_ptr<BlobReader>> Open(const BlobRef& blob) override {
    const base::MutexLock lock(mu_);
    const auto found = blobs_.find(blob.name());
    if (found == blobs_.end() || found->second->size != blob.bytes()) {
      return absl::DataLossError(
          absl::StrCat("no ", blob.bytes(), " bytes are stored under ", blob.name()));
    }
    return std::make_unique<MemoryReader>(found->second);
  }

  void Remove(const BlobRef& blob) override {
    const base::MutexLock lock(mu_);
    blobs_.erase(blob.name());
  }

  absl::Status RemoveAllBut(const std::set<std::string>& names) override {
    const base::MutexLock lock(mu_);
    std::erase_if(blobs_, [&](const auto& blob) { return names.count(blob.first) == 0; });
    return absl::OkStatus();
  }

  BlobRef Keep(std::shared_ptr<const BlockedBytes> bytes) {
    const base::MutexLock lock(mu_);
    BlobRef blob;
    blob.set_name(absl::StrCat(next_name_++));
    blob.set_bytes(bytes->size);
    blobs_.emplace(blob.name(), std::move(bytes));
    return blob;
  }

 private:
  base::Mutex mu_;
  int64_t next_name_ ABSL_GUARDED_BY(mu_) = 1;
  std::map<std::string, std::shared_ptr<const BlockedBytes>> blobs_ ABSL_GUARDED_BY(mu_);
};

class MemoryWriter final : public BlobWriter {
 public:
  explicit MemoryWriter(MemoryBlobs& blobs)
      : blobs_(blobs), bytes_(std::make_shared<BlockedBytes>()) {}

  absl::Status Append(std::span<const std::byte> bytes) override {
    bytes_->size += static_cast<int64_t>(bytes.size());
    while (!bytes.empty()) {
      if (bytes_->blocks.empty() || bytes_->blocks.back().size() == kBlock) {
        bytes_->blocks.emplace_back();
      }
      std::vector<std::byte>& block = bytes_->blocks.back();
      const size_t count = std::min(bytes.size(), kBlock - block.size());
      block.insert(block.end(), bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(count));
      bytes = bytes.subspan(count);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<BlobRef> Commit() override {
    if (!bytes_->blocks.empty()) bytes_->blocks.back().shrink_to_fit();
    return blobs_.Keep(std::move(bytes_));
  }

 private:
  MemoryBlobs& blobs_;
  std::shared_ptr<BlockedBytes> bytes_;
};

absl::StatusOr<std::unique_ptr<BlobWriter>> MemoryBlobs::Create() {
  return std::make_unique<MemoryWriter>(*this);
}

}  // namespace

std::unique_ptr<Blobs> MakeMemoryBlobs() { return std::make_unique<MemoryBlobs>(); }

}  // namespace certiq::server
