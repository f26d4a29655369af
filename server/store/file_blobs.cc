#include "store/file_blobs.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "store/checksum.h"

namespace certiq::server {
namespace {

constexpr absl::string_view kMagic = "certiqB1";
constexpr size_t kSumBytes = sizeof(uint64_t);
constexpr size_t kHeaderBytes = 8 + kSumBytes;
constexpr size_t kBlockBytes = kBlobBlockBytes;
// The bytes of a block and its checksum.
constexpr size_t kStride = kBlockBytes + kSumBytes;
constexpr uint64_t kHeaderNumber = ~uint64_t{0};
constexpr size_t kNameBytes = 16;

// The checksum of block `number` of the blob `name`.
std::array<std::byte, kSumBytes> BlockSum(const std::string& name, uint64_t number,
                                          std::span<const std::byte> block) {
  const uint64_t seed = Checksum(std::as_bytes(std::span(name)), number);
  const uint64_t sum = Checksum(block, seed);
  std::array<std::byte, kSumBytes> bytes;
  for (size_t i = 0; i < kSumBytes; ++i) bytes[i] = static_cast<std::byte>(sum >> (8 * i));
  return bytes;
}

// REQUIRES: `stored` is a block and its checksum.
bool IsWhole(const std::string& name, uint64_t number, std::span<const std::byte> stored) {
  const auto sum = BlockSum(name, number, stored.first(stored.size() - kSumBytes));
  return std::equal(sum.begin(), sum.end(), stored.end() - kSumBytes);
}

int64_t FileBytes(int64_t payload) {
  const int64_t blocks = (payload + kBlobBlockBytes - 1) / kBlobBlockBytes;
  return static_cast<int64_t>(kHeaderBytes) + payload + blocks * static_cast<int64_t>(kSumBytes);
}

std::string FinishedName(const std::string& name) {
  return absl::StrCat(kBlobDirectory, "/", name);
}

// The names of the files in `directory` that are blobs by their names.
absl::StatusOr<std::vector<std::string>> BlobsIn(Disk& disk, const char* directory) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, disk.List(directory));
  std::vector<std::string> blobs;
  for (const std::string& name : names) {
    if (!IsBlobName(name)) continue;
    ASSIGN_OR_RETURN(const std::optional<DiskEntry> entry,
                     disk.Look(absl::StrCat(directory, "/", name)));
    if (entry.has_value() && entry->kind == DiskEntry::Kind::kFile) blobs.push_back(name);
  }
  return blobs;
}

class FileWriter final : public BlobWriter {
 public:
  FileWriter(std::shared_ptr<Disk> disk, std::string name, DiskFile file)
      : disk_(std::move(disk)), name_(std::move(name)), file_(std::move(file)) {
    buffer_.reserve(kStride);
  }

  // Failing to remove is no error: the next start removes what is left.
  ~FileWriter() override {
    if (!moved_) disk_->Remove(file_.name()).IgnoreError();
  }

  absl::Status WriteHeader() {
    const auto magic = std::as_bytes(std::span(kMagic));
    buffer_.assign(magic.begin(), magic.end());
    return WriteWithSum(kHeaderNumber);
  }

  absl::Status Append(std::span<const std::byte> bytes) override {
    while (!bytes.empty() && status_.ok()) {
      const size_t count = std::min(bytes.size(), kBlockBytes - buffer_.size());
      buffer_.insert(buffer_.end(), bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(count));
      bytes = bytes.subspan(count);
      size_ += static_cast<int64_t>(count);
      if (buffer_.size() == kBlockBytes) status_ = WriteWithSum(next_++);
    }
    return status_;
  }

  absl::StatusOr<BlobRef> Commit() override {
    if (status_.ok() && !buffer_.empty()) status_ = WriteWithSum(next_++);
    if (status_.ok()) status_ = disk_->Sync(file_);
    if (status_.ok()) status_ = disk_->Rename(file_.name(), FinishedName(name_));
    if (!status_.ok()) return status_;
    moved_ = true;
    status_ = disk_->SyncDirectory(kBlobDirectory);
    if (status_.ok()) {
      BlobRef blob;
      blob.set_name(name_);
      blob.set_bytes(size_);
      return blob;
    }
    disk_->Remove(FinishedName(name_)).IgnoreError();
    return status_;
  }

 private:
  // Empties the buffer into the file, with its checksum.
  absl::Status WriteWithSum(uint64_t number) {
    const auto sum = BlockSum(name_, number, buffer_);
    buffer_.insert(buffer_.end(), sum.begin(), sum.end());
    absl::Status status = disk_->Write(file_, buffer_);
    buffer_.clear();
    return status;
  }

  const std::shared_ptr<Disk> disk_;
  const std::string name_;
  const DiskFile file_;
  std::vector<std::byte> buffer_;
  // Number of the block in the buffer.
  uint64_t next_ = 0;
  int64_t size_ = 0;
  bool moved_ = false;
  // What went wrong first: the file is of no use after it.
  absl::Status status_;
};

class FileReader final : public BlobReader {
 public:
  FileReader(std::shared_ptr<Disk> disk, BlobRef blob, DiskFile file)
      : disk_(std::move(disk)), blob_(std::move(blob)), file_(std::move(file)) {}

  int64_t bytes() const override { return blob_.bytes(); }

  absl::Status CheckHeader() const {
    ASSIGN_OR_RETURN(const int64_t size, disk_->Size(file_));
    // The first comparison keeps FileBytes from overflowing.
    if (blob_.bytes() < 0 || blob_.bytes() > size || FileBytes(blob_.bytes()) != size) {
      return Damaged(absl::StrCat("holds ", size, " bytes, which are not those of a tensor of ",
                                  blob_.bytes()));
    }
    std::array<std::byte, kHeaderBytes> header;
    RETURN_IF_ERROR(disk_->Read(file_, 0, header));
    const auto magic = std::as_bytes(std::span(kMagic));
    if (!std::equal(magic.begin(), magic.end(), header.begin()) ||
        !IsWhole(blob_.name(), kHeaderNumber, header)) {
      return Damaged("its header is not that of this tensor");
    }
    return absl::OkStatus();
  }

  absl::Status Read(int64_t offset, std::span<std::byte> to) const override {
    std::vector<std::byte> stored;
    while (!to.empty()) {
      const int64_t number = offset / kBlobBlockBytes;
      const auto begin = static_cast<size_t>(offset % kBlobBlockBytes);
      const auto rest = static_cast<size_t>(blob_.bytes() - number * kBlobBlockBytes);
      const size_t block = std::min(kBlockBytes, rest);
      stored.resize(block + kSumBytes);
      const int64_t position =
          static_cast<int64_t>(kHeaderBytes) + number * static_cast<int64_t>(kStride);
      RETURN_IF_ERROR(disk_->Read(file_, position, stored));
      if (!IsWhole(blob_.name(), static_cast<uint64_t>(number), stored)) {
        return Damaged(absl::StrCat("what was written at ", position, " has changed"));
      }
      const size_t count = std::min(to.size(), block - begin);
      std::copy_n(stored.data() + begin, count, to.data());
      to = to.subspan(count);
      offset += static_cast<int64_t>(count);
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Damaged(absl::string_view why) const {
    return absl::DataLossError(absl::StrCat(file_.name(), ": ", why));
  }

  const std::shared_ptr<Disk> disk_;
  const BlobRef blob_;
  const DiskFile file_;
};

class FileBlobs final : public Blobs {
 public:
  FileBlobs(std::shared_ptr<Disk> disk, std::shared_ptr<DiskReserve> reserve)
      : disk_(std::move(disk)), reserve_(std::move(reserve)) {}

  absl::StatusOr<std::unique_ptr<BlobWriter>> Create() override {
    RETURN_IF_ERROR(reserve_->Fill());
    if (!reserve_->held()) return DiskError(kIncomingDirectory, "create", ENOSPC);
    std::string random(kNameBytes, '\0');
    if (getentropy(random.data(), random.size()) != 0) {
      return DiskError(kIncomingDirectory, "random name", errno);
    }
    std::string name = absl::BytesToHexString(random);
    ASSIGN_OR_RETURN(DiskFile file, disk_->Create(absl::StrCat(kIncomingDirectory, "/", name)));
    auto writer = std::make_unique<FileWriter>(disk_, std::move(name), std::move(file));
    RETURN_IF_ERROR(writer->WriteHeader());
    return writer;
  }

  absl::StatusOr<std::unique_ptr<BlobReader>> Open(const BlobRef& blob) override {
    if (!IsBlobName(blob.name())) {
      return absl::DataLossError(absl::StrCat(
          kBlobDirectory, "/: \"", absl::CHexEscape(blob.name()), "\" is no name of a tensor"));
    }
    absl::StatusOr<DiskFile> file = disk_->OpenToRead(FinishedName(blob.name()));
    if (absl::IsNotFound(file.status())) return absl::DataLossError(file.status().message());
    if (!file.ok()) return file.status();
    auto reader = std::make_unique<FileReader>(disk_, blob, *std::move(file));
    RETURN_IF_ERROR(reader->CheckHeader());
    return reader;
  }

  absl::Status HasRoom(int64_t bytes) override {
    RETURN_IF_ERROR(reserve_->Fill());
    ASSIGN_OR_RETURN(const int64_t room, disk_->Room());
    if (reserve_->held() && FileBytes(bytes) <= room) return absl::OkStatus();
    return DiskError(kIncomingDirectory, absl::StrCat("room for ", bytes, " bytes"), ENOSPC);
  }

  void Remove(const BlobRef& blob) override {
    RemoveFinished(blob.name()).IgnoreError();
    reserve_->Fill().IgnoreError();
  }

  absl::Status RemoveAllBut(const std::set<std::string>& names) override {
    RETURN_IF_ERROR(RemoveAllIn(kBlobDirectory, names));
    return RemoveAllIn(kIncomingDirectory, {});
  }

 private:
  absl::Status RemoveFinished(const std::string& name) {
    return IsBlobName(name) ? disk_->Remove(FinishedName(name)) : absl::OkStatus();
  }

  // All blobs but these.
  absl::Status RemoveAllIn(const char* directory, const std::set<std::string>& but) {
    ASSIGN_OR_RETURN(const std::vector<std::string> names, BlobsIn(*disk_, directory));
    for (const std::string& name : names) {
      if (but.count(name) != 0) continue;
      RETURN_IF_ERROR(disk_->Remove(absl::StrCat(directory, "/", name)));
    }
    return absl::OkStatus();
  }

  const std::shared_ptr<Disk> disk_;
  const std::shared_ptr<DiskReserve> reserve_;
};

}  // namespace

bool IsBlobName(const std::string& name) {
  return name.size() == 2 * kNameBytes &&
         name.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::unique_ptr<Blobs> MakeFileBlobs(std::shared_ptr<Disk> disk,
                                     std::shared_ptr<DiskReserve> reserve) {
  return std::make_unique<FileBlobs>(std::move(disk), std::move(reserve));
}

absl::Status SetAsideAllBut(Disk& disk, const std::set<std::string>& names) {
  ASSIGN_OR_RETURN(const std::vector<std::string> blobs, BlobsIn(disk, kBlobDirectory));
  RETURN_IF_ERROR(disk.MakeDirectory(kQuarantineDirectory));
  for (const std::string& name : blobs) {
    if (names.count(name) != 0) continue;
    RETURN_IF_ERROR(disk.Rename(FinishedName(name), absl::StrCat(kQuarantineDirectory, "/", name)));
  }
  RETURN_IF_ERROR(disk.SyncDirectory(kQuarantineDirectory));
  return disk.SyncDirectory(kBlobDirectory);
}

}  // namespace certiq::server
