#include "store/commits.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/id.h"
#include "base/status_macros.h"
#include "store/checksum.h"
#include "store/schema.h"

namespace certiq::server {
namespace {

constexpr absl::string_view kCommitsMagic = "certiqC1";
constexpr size_t kLineageBytes = 32;
constexpr size_t kNumberAt = 8 + kLineageBytes;
constexpr size_t kSumAt = kNumberAt + 8;
constexpr size_t kCopyBytes = kSumAt + 8;
// More than what a disk writes at once.
constexpr int64_t kCopyStride = 4096;
constexpr int64_t kCopies = 2;
constexpr int64_t kFileBytes = kCopies * kCopyStride;

using Copy = std::array<std::byte, kCopyBytes>;

void PutInteger(uint64_t value, std::byte* to) {
  for (size_t i = 0; i < 8; ++i) to[i] = static_cast<std::byte>(value >> (8 * i));
}

uint64_t GetInteger(const std::byte* from) {
  uint64_t value = 0;
  for (size_t i = 0; i < 8; ++i) value |= static_cast<uint64_t>(from[i]) << (8 * i);
  return value;
}

uint64_t SumOf(const Copy& copy) { return Checksum(std::span(copy).first(kSumAt), 0); }

Copy Encode(const Commits& commits) {
  Copy copy = {};
  std::memcpy(copy.data(), kCommitsMagic.data(), kCommitsMagic.size());
  std::memcpy(copy.data() + kCommitsMagic.size(), commits.lineage.data(),
              std::min(kLineageBytes, commits.lineage.size()));
  PutInteger(static_cast<uint64_t>(commits.number), copy.data() + kNumberAt);
  PutInteger(SumOf(copy), copy.data() + kSumAt);
  return copy;
}

std::optional<Commits> Decode(const Copy& copy) {
  if (std::memcmp(copy.data(), kCommitsMagic.data(), kCommitsMagic.size()) != 0 ||
      GetInteger(copy.data() + kSumAt) != SumOf(copy)) {
    return std::nullopt;
  }
  Commits commits;
  commits.lineage.assign(reinterpret_cast<const char*>(copy.data()) + kCommitsMagic.size(),
                         kLineageBytes);
  commits.number = static_cast<int64_t>(GetInteger(copy.data() + kNumberAt));
  return commits;
}

// The exclusive or of the checksums of all records, as the triggers keep it.
absl::StatusOr<int64_t> DigestOfRecords(SqlDatabase& database) {
  ASSIGN_OR_RETURN(SqlStatement select, database.Prepare("SELECT checksum FROM calibrations "
                                                         "UNION ALL SELECT checksum FROM jobs"));
  uint64_t digest = 0;
  for (;;) {
    ASSIGN_OR_RETURN(const bool more, select.Step());
    if (!more) return static_cast<int64_t>(digest);
    digest ^= static_cast<uint64_t>(select.NextInteger());
  }
}

// The code differs where anything differs that the loss was found by.
Loss MakeLoss(std::string what, const absl::StatusOr<std::optional<Commits>>& beside,
              const CommitsRow* row, int64_t digest) {
  std::string found = "damaged";
  if (beside.ok()) {
    found = beside->has_value() ? absl::StrCat((*beside)->lineage, (*beside)->number) : "none";
  }
  if (row != nullptr) {
    absl::StrAppend(&found, "/", row->commits.lineage, row->commits.number, "/", row->digest, "/",
                    digest);
  }
  const auto sum = static_cast<uint32_t>(Checksum(std::as_bytes(std::span(found)), 0));
  return {std::move(what), absl::StrCat(absl::Hex(sum, absl::kZeroPad8))};
}

}  // namespace

std::string NewLineage() { return base::NewId(""); }

absl::StatusOr<bool> CommitsFile::IsOne(Disk& disk) {
  ASSIGN_OR_RETURN(const DiskFile file, disk.OpenToRead(kCommitsName));
  ASSIGN_OR_RETURN(const int64_t size, disk.Size(file));
  for (int64_t at = 0; at < kFileBytes && at + static_cast<int64_t>(kCommitsMagic.size()) <= size;
       at += kCopyStride) {
    std::array<std::byte, kCommitsMagic.size()> magic;
    RETURN_IF_ERROR(disk.Read(file, at, magic));
    if (std::memcmp(magic.data(), kCommitsMagic.data(), kCommitsMagic.size()) == 0) return true;
  }
  return false;
}

absl::StatusOr<std::optional<Commits>> CommitsFile::Read() {
  absl::StatusOr<DiskFile> file = disk_->OpenToChange(kCommitsName);
  if (absl::IsNotFound(file.status())) return std::optional<Commits>();
  if (!file.ok()) return file.status();
  ASSIGN_OR_RETURN(const int64_t size, disk_->Size(*file));
  std::optional<Commits> newest;
  for (int64_t at = 0; at + kCopyStride <= size && at < kFileBytes; at += kCopyStride) {
    Copy copy;
    RETURN_IF_ERROR(disk_->Read(*file, at, copy));
    const std::optional<Commits> found = Decode(copy);
    if (!found.has_value() || (newest.has_value() && newest->number >= found->number)) continue;
    newest = found;
    next_ = (at + kCopyStride) % kFileBytes;
  }
  if (!newest.has_value()) {
    return absl::DataLossError(absl::StrCat(kCommitsName, ": both of its copies are damaged"));
  }
  // One that was cut would grow when it is written.
  if (size < kFileBytes) RETURN_IF_ERROR(disk_->Allocate(*file, kFileBytes));
  file_ = *std::move(file);
  commits_ = *newest;
  return newest;
}

absl::Status CommitsFile::Create(const Commits& commits) {
  RETURN_IF_ERROR(disk_->Remove(kNewCommitsName));
  ASSIGN_OR_RETURN(DiskFile file, disk_->Create(kNewCommitsName));
  RETURN_IF_ERROR(disk_->Allocate(file, kFileBytes));
  // Zeros that were only allocated may be written for the first time later, which is a change of
  // the file's metadata: all of it is written now.
  const std::vector<std::byte> zeros(kFileBytes);
  RETURN_IF_ERROR(disk_->WriteAt(file, 0, zeros));
  RETURN_IF_ERROR(disk_->WriteAt(file, 0, Encode(commits)));
  RETURN_IF_ERROR(disk_->Sync(file));
  RETURN_IF_ERROR(disk_->Rename(kNewCommitsName, kCommitsName));
  RETURN_IF_ERROR(disk_->SyncDirectory(""));
  file_ = std::move(file);
  commits_ = commits;
  next_ = kCopyStride;
  behind_ = false;
  return absl::OkStatus();
}

absl::Status CommitsFile::Advance(int64_t number) {
  commits_.number = number;
  behind_ = true;
  RETURN_IF_ERROR(disk_->WriteAt(file_, next_, Encode(commits_)));
  RETURN_IF_ERROR(disk_->SyncData(file_));
  behind_ = false;
  next_ = (next_ + kCopyStride) % kFileBytes;
  return absl::OkStatus();
}

absl::StatusOr<std::optional<CommitsRow>> ReadCommits(SqlDatabase& database) {
  ASSIGN_OR_RETURN(
      const int64_t tables,
      database.Number("SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = "
                      "'commits'"));
  if (tables == 0) return std::optional<CommitsRow>();
  ASSIGN_OR_RETURN(SqlStatement select,
                   database.Prepare("SELECT lineage, number, digest FROM commits"));
  ASSIGN_OR_RETURN(const bool found, select.Step());
  if (!found) return database.Damaged("its table of commits is empty");
  CommitsRow row;
  row.commits.lineage = select.NextString();
  row.commits.number = select.NextInteger();
  row.digest = select.NextInteger();
  return std::optional<CommitsRow>(std::move(row));
}

absl::StatusOr<int64_t> ReadCommitNumber(SqlDatabase& database) {
  return database.Number("SELECT number FROM commits");
}

absl::Status CreateCommits(SqlDatabase& database, const std::string& lineage) {
  RETURN_IF_ERROR(database.Run(kCreateCommits));
  RETURN_IF_ERROR(database.Run("INSERT INTO commits VALUES (1, '', 0, 0, 0)"));
  return ResetCommits(database, {.lineage = lineage, .number = 1});
}

absl::Status ResetCommits(SqlDatabase& database, const Commits& commits) {
  ASSIGN_OR_RETURN(const int64_t digest, DigestOfRecords(database));
  ASSIGN_OR_RETURN(SqlStatement update,
                   database.Prepare("UPDATE commits SET lineage = ?1, number = ?2, "
                                    "negative = -?2, digest = ?3"));
  update.BindText(commits.lineage);
  update.BindInteger(commits.number);
  update.BindInteger(digest);
  return update.Run();
}

absl::StatusOr<std::optional<Loss>> FindLoss(SqlDatabase& database,
                                             const absl::StatusOr<std::optional<Commits>>& beside) {
  if (!beside.ok() && !absl::IsDataLoss(beside.status())) return beside.status();
  ASSIGN_OR_RETURN(const std::optional<CommitsRow> row, ReadCommits(database));
  // A database without commits is new, or one of a version that did not count them.
  if (!row.has_value()) return FindLossOfAll(beside);
  ASSIGN_OR_RETURN(const int64_t digest, DigestOfRecords(database));
  const auto loss = [&](std::string what) {
    return std::optional<Loss>(MakeLoss(std::move(what), beside, &*row, digest));
  };
  if (!beside.ok()) return loss(std::string(beside.status().message()));
  if (!beside->has_value()) {
    return loss(absl::StrCat("the file ", kCommitsName,
                             ", which says how far state.db had come, is not there"));
  }
  const Commits& told = **beside;
  if (told.lineage != row->commits.lineage) {
    return loss(absl::StrCat("state.db is not the one that the file ", kCommitsName,
                             " belongs to: it was put there from elsewhere"));
  }
  if (row->commits.number < told.number) {
    return loss(absl::StrCat("state.db has lost changes that were acknowledged: it is at change ",
                             row->commits.number, ", they went up to ", told.number,
                             ". Its log state.db-wal is damaged or gone, or an older copy of it "
                             "was put there"));
  }
  if (row->digest != digest) {
    return loss(
        "state.db holds records of different moments: it, or its log state.db-wal, is "
        "damaged or a copy of another moment");
  }
  return std::optional<Loss>();
}

std::optional<Loss> FindLossOfAll(const absl::StatusOr<std::optional<Commits>>& beside) {
  if (!beside.ok()) {
    return MakeLoss(std::string(beside.status().message()), beside, nullptr, 0);
  }
  if (!beside->has_value() || (*beside)->number == 0) return std::nullopt;
  return MakeLoss(
      absl::StrCat("state.db has lost changes that were acknowledged: none of them is "
                   "in it, they went up to ",
                   (*beside)->number, ". It is gone, emptied, or an older version's was put there"),
      beside, nullptr, 0);
}

absl::Status LossError(const Loss& loss, const std::string& accepted) {
  return absl::DataLossError(absl::StrCat(
      loss.what,
      ". Nothing was changed. Restore a backup of the whole directory; or go on without "
      "what is lost by starting with --accept_loss ",
      loss.code, ", which moves tensors that no record names any more to quarantine/",
      accepted.empty() ? "" : absl::StrCat(" (--accept_loss ", accepted, " is for another loss)")));
}

}  // namespace certiq::server
