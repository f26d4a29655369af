#include "store/data_dir.h"

#include <unistd.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "store/commits.h"
#include "store/file_blobs.h"
#include "store/open_database.h"
#include "store/reserve.h"

namespace certiq::server {
namespace {

constexpr char kLockName[] = "lock";
// mkfs makes it.
constexpr char kLostAndFound[] = "lost+found";
constexpr size_t kNamesTold = 5;

using Kind = DiskEntry::Kind;

struct KnownName {
  absl::string_view name;
  Kind kind;
};

constexpr KnownName kKnownNames[] = {
    {kLockName, Kind::kFile},
    {kCommitsName, Kind::kFile},
    {kNewCommitsName, Kind::kFile},
    {kDatabaseName, Kind::kFile},
    {kLogName, Kind::kFile},
    {kJournalName, Kind::kFile},
    // SQLite makes it for a program that looks at the database from outside.
    {"state.db-shm", Kind::kFile},
    {kReserveName, Kind::kFile},
    {kBlobDirectory, Kind::kDirectory},
    {kIncomingDirectory, Kind::kDirectory},
    {kQuarantineDirectory, Kind::kDirectory},
    {kLostAndFound, Kind::kDirectory},
};

const KnownName* Find(absl::string_view name) {
  const auto* const found =
      std::find_if(std::begin(kKnownNames), std::end(kKnownNames),
                   [&](const KnownName& known) { return known.name == name; });
  return found == std::end(kKnownNames) ? nullptr : found;
}

absl::string_view NameOf(Kind kind) {
  switch (kind) {
    case Kind::kFile:
      return "a file";
    case Kind::kDirectory:
      return "a directory";
    case Kind::kLink:
      return "a symbolic link";
    case Kind::kOther:
      break;
  }
  return "neither a file nor a directory";
}

// The first few of them, for a message.
std::string Told(std::vector<std::string> names) {
  std::sort(names.begin(), names.end());
  const size_t more = names.size() - std::min(names.size(), kNamesTold);
  names.resize(names.size() - more);
  for (std::string& name : names) name = absl::CHexEscape(name);
  return absl::StrCat(absl::StrJoin(names, ", "),
                      more == 0 ? "" : absl::StrCat(" and ", more, " more"));
}

bool Has(const std::vector<std::string>& names, absl::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// What is in the directory, without what a file system puts there.
absl::StatusOr<std::vector<std::string>> Entries(Disk& disk) {
  ASSIGN_OR_RETURN(std::vector<std::string> names, disk.List(""));
  const auto found = std::find(names.begin(), names.end(), kLostAndFound);
  if (found == names.end()) return names;
  ASSIGN_OR_RETURN(const std::optional<DiskEntry> entry, disk.Look(kLostAndFound));
  if (entry.has_value() && entry->kind == Kind::kDirectory) names.erase(found);
  return names;
}

absl::Status NotOurs(const Disk& disk, const std::vector<std::string>& names) {
  return absl::FailedPreconditionError(absl::StrCat(
      disk.Path(""),
      ": is not a data directory of certiq, and not empty. Expected: a directory that is empty or "
      "not there yet, or one with a state.db of certiq's. Found: ",
      Told(names), ". Give certiq a directory of its own. Nothing in this one was changed"));
}

// Names that stand for something else than a server makes of them: whoever put them there could
// have it write elsewhere.
absl::Status CheckKinds(Disk& disk, const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    const KnownName* const known = Find(name);
    if (known == nullptr) continue;
    ASSIGN_OR_RETURN(const std::optional<DiskEntry> entry, disk.Look(name));
    if (!entry.has_value() || entry->kind == known->kind) continue;
    return absl::FailedPreconditionError(absl::StrCat(
        disk.Path(""), ": ", name, " is ", NameOf(entry->kind), ", expected ", NameOf(known->kind),
        ": this is not a data directory of certiq, or not any more. Nothing in it was changed"));
  }
  return absl::OkStatus();
}

absl::StatusOr<bool> HoldsNothing(Disk& disk, absl::string_view name) {
  const KnownName* const known = Find(name);
  if (known == nullptr) return false;
  if (known->kind == Kind::kDirectory) {
    ASSIGN_OR_RETURN(const std::vector<std::string> inside, disk.List(std::string(name)));
    return inside.empty();
  }
  ASSIGN_OR_RETURN(const std::optional<DiskEntry> entry, disk.Look(std::string(name)));
  return !entry.has_value() || entry->bytes == 0;
}

// Whether these entries are what a first start leaves that was interrupted before it had a
// database: files that are empty, but for those that are being made, and empty directories.
absl::StatusOr<bool> IsBeginning(Disk& disk, const std::vector<std::string>& names) {
  if (!Has(names, kLockName)) return false;
  for (const std::string& name : names) {
    if (name == kNewCommitsName || name == kDatabaseName) continue;
    if (name == kLogName) {
      // SQLite takes away the log of a database that is empty.
      ASSIGN_OR_RETURN(const bool no_database, HoldsNothing(disk, kDatabaseName));
      if (!no_database) continue;
    }
    ASSIGN_OR_RETURN(const bool nothing, HoldsNothing(disk, name));
    if (!nothing) return false;
  }
  return true;
}

// OK where a server may use the directory with these entries.
absl::Status CheckOwner(Disk& disk, const char* vfs, const std::vector<std::string>& names) {
  if (names.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(CheckKinds(disk, names));
  if (Has(names, kCommitsName)) {
    const absl::StatusOr<bool> counted = CommitsFile::IsOne(disk);
    if (!counted.ok()) return counted.status();
    if (*counted) return absl::OkStatus();
  }
  if (Has(names, kDatabaseName)) {
    ASSIGN_OR_RETURN(const DatabaseOwner owner, LookAtDatabase(disk, vfs));
    if (owner == DatabaseOwner::kUs) return absl::OkStatus();
    if (owner == DatabaseOwner::kOthers) return NotOurs(disk, names);
  }
  ASSIGN_OR_RETURN(const bool beginning, IsBeginning(disk, names));
  return beginning ? absl::OkStatus() : NotOurs(disk, names);
}

absl::StatusOr<std::shared_ptr<const DiskFile>> Locked(Disk& disk, DiskFile file) {
  RETURN_IF_ERROR(disk.Lock(file));
  return std::make_shared<const DiskFile>(std::move(file));
}

// Names in `directory` for which `ours` does not hold.
absl::StatusOr<std::vector<std::string>> Strangers(
    Disk& disk, const char* directory, const std::function<bool(const std::string&)>& ours) {
  ASSIGN_OR_RETURN(std::vector<std::string> names, disk.List(directory));
  names.erase(std::remove_if(names.begin(), names.end(), ours), names.end());
  return names;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const DiskFile>> TakeDataDir(Disk& disk, const char* vfs) {
  RETURN_IF_ERROR(disk.MakeDirectory(""));
  ASSIGN_OR_RETURN(std::vector<std::string> names, Entries(disk));
  std::shared_ptr<const DiskFile> lock;
  if (Has(names, kLockName)) {
    // What is there is judged while nobody changes it.
    RETURN_IF_ERROR(CheckKinds(disk, names));
    ASSIGN_OR_RETURN(DiskFile file, disk.OpenToRead(kLockName));
    ASSIGN_OR_RETURN(lock, Locked(disk, std::move(file)));
    ASSIGN_OR_RETURN(names, Entries(disk));
  }
  RETURN_IF_ERROR(CheckOwner(disk, vfs, names));
  if (lock != nullptr) return lock;
  ASSIGN_OR_RETURN(DiskFile file, disk.OpenOrCreate(kLockName));
  ASSIGN_OR_RETURN(lock, Locked(disk, std::move(file)));
  // Another server may have been there first, and gone.
  ASSIGN_OR_RETURN(names, Entries(disk));
  RETURN_IF_ERROR(CheckOwner(disk, vfs, names));
  return lock;
}

absl::StatusOr<std::vector<std::string>> WarningsAbout(Disk& disk) {
  std::vector<std::string> warnings;
  const auto strangers = [&](const char* directory,
                             const std::function<bool(const std::string&)>& ours) -> absl::Status {
    ASSIGN_OR_RETURN(const std::vector<std::string> names, Strangers(disk, directory, ours));
    if (names.empty()) return absl::OkStatus();
    const std::string folder = absl::StrCat(directory, *directory == '\0' ? "" : "/");
    warnings.push_back(
        absl::StrCat(disk.Path(folder), ": holds what no server made, which stays: ", Told(names)));
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(strangers("", [](const std::string& name) { return Find(name) != nullptr; }));
  RETURN_IF_ERROR(strangers(kBlobDirectory, IsBlobName));
  RETURN_IF_ERROR(strangers(kIncomingDirectory, IsBlobName));

  std::vector<std::string> open;
  std::vector<std::string> of_others;
  for (const absl::string_view name :
       {absl::string_view(), absl::string_view(kDatabaseName), absl::string_view(kLogName),
        absl::string_view(kCommitsName), absl::string_view(kBlobDirectory),
        absl::string_view(kIncomingDirectory)}) {
    ASSIGN_OR_RETURN(const std::optional<DiskEntry> entry, disk.Look(std::string(name)));
    if (!entry.has_value()) continue;
    const std::string path = disk.Path(std::string(name));
    if (entry->written_by_all) open.push_back(path);
    // A volume belongs to root, and its group may use it.
    if (entry->owner != geteuid() && entry->owner != 0) of_others.push_back(path);
  }
  if (!open.empty()) {
    warnings.push_back(
        absl::StrCat("everyone on this machine may change: ", Told(open),
                     ". Who may write here can change and remove what clients stored (chmod o-w)"));
  }
  if (!of_others.empty()) {
    warnings.push_back(
        absl::StrCat("belongs neither to this server's user nor to root: ", Told(of_others),
                     ". Its owner can change what clients stored (chown)"));
  }
  return warnings;
}

}  // namespace certiq::server
