#include "store/memory_store.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace certiq::server {
namespace {

constexpr size_t kBlock = size_t{1} << 20;

// In blocks, so that growing neither copies nor holds twice the bytes.
struct Bytes {
  std::vector<std::vector<std::byte>> blocks;
  int64_t size = 0;
};

class MemoryReader final : public BlobReader {
 public:
  explicit MemoryReader(std::shared_ptr<const Bytes> bytes) : bytes_(std::move(bytes)) {}

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
  std::shared_ptr<const Bytes> bytes_;
};

class MemoryStore final : public Store {
 public:
  bool durable() const override { return false; }
  absl::StatusOr<StoredState> Load() override;
  absl::StatusOr<std::unique_ptr<BlobWriter>> CreateBlob() override;
  absl::StatusOr<std::unique_ptr<BlobReader>> OpenBlob(const BlobRef& blob) override;
  void DeleteBlob(const BlobRef& blob) override;
  absl::Status PutCalibration(const CalibrationRecord& record) override;
  absl::Status PutJob(const JobRecord& record) override;
  absl::Status DeleteCalibration(const std::string& id) override;
  absl::Status DeleteJob(const std::string& id) override;

  BlobRef Keep(std::shared_ptr<const Bytes> bytes);

 private:
  std::mutex mu_;
  // All guarded by mu_.
  int64_t next_name_ = 1;
  std::unordered_map<std::string, std::shared_ptr<const Bytes>> blobs_;
  std::map<std::string, CalibrationRecord> calibrations_;
  std::map<std::string, JobRecord> jobs_;
};

class MemoryWriter final : public BlobWriter {
 public:
  explicit MemoryWriter(MemoryStore& store) : store_(store), bytes_(std::make_shared<Bytes>()) {}

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
    return store_.Keep(std::move(bytes_));
  }

 private:
  MemoryStore& store_;
  std::shared_ptr<Bytes> bytes_;
};

absl::StatusOr<StoredState> MemoryStore::Load() {
  const std::lock_guard lock(mu_);
  StoredState state;
  std::unordered_set<std::string> named;
  for (const auto& [id, record] : calibrations_) {
    state.calibrations.push_back(record);
    named.insert(record.sums.name);
  }
  for (const auto& [id, record] : jobs_) {
    state.jobs.push_back(record);
    named.insert({record.weights.name, record.result.name});
  }
  std::sort(state.jobs.begin(), state.jobs.end(),
            [](const JobRecord& a, const JobRecord& b) { return a.number < b.number; });
  std::erase_if(blobs_, [&](const auto& blob) { return !named.contains(blob.first); });
  return state;
}

absl::StatusOr<std::unique_ptr<BlobWriter>> MemoryStore::CreateBlob() {
  return std::make_unique<MemoryWriter>(*this);
}

BlobRef MemoryStore::Keep(std::shared_ptr<const Bytes> bytes) {
  const std::lock_guard lock(mu_);
  BlobRef blob{absl::StrCat(next_name_++), bytes->size};
  blobs_.emplace(blob.name, std::move(bytes));
  return blob;
}

absl::StatusOr<std::unique_ptr<BlobReader>> MemoryStore::OpenBlob(const BlobRef& blob) {
  const std::lock_guard lock(mu_);
  const auto found = blobs_.find(blob.name);
  if (found == blobs_.end() || found->second->size != blob.bytes) {
    return absl::DataLossError(
        absl::StrCat("no ", blob.bytes, " bytes are stored under ", blob.name));
  }
  return std::make_unique<MemoryReader>(found->second);
}

void MemoryStore::DeleteBlob(const BlobRef& blob) {
  const std::lock_guard lock(mu_);
  blobs_.erase(blob.name);
}

absl::Status MemoryStore::PutCalibration(const CalibrationRecord& record) {
  const std::lock_guard lock(mu_);
  calibrations_.insert_or_assign(record.id, record);
  return absl::OkStatus();
}

absl::Status MemoryStore::PutJob(const JobRecord& record) {
  const std::lock_guard lock(mu_);
  jobs_.insert_or_assign(record.id, record);
  return absl::OkStatus();
}

absl::Status MemoryStore::DeleteCalibration(const std::string& id) {
  const std::lock_guard lock(mu_);
  calibrations_.erase(id);
  return absl::OkStatus();
}

absl::Status MemoryStore::DeleteJob(const std::string& id) {
  const std::lock_guard lock(mu_);
  jobs_.erase(id);
  return absl::OkStatus();
}

}  // namespace

std::unique_ptr<Store> NewMemoryStore() { return std::make_unique<MemoryStore>(); }

}  // namespace certiq::server
