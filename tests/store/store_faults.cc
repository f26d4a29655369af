#include "store/store_faults.h"

#include <sqlite3.h>
#include <unistd.h>

#include <cerrno>

#include "absl/strings/str_cat.h"

namespace certiq::server::testing {
namespace {

constexpr char kVfsName[] = "certiq-faults";

// Of the one test that runs.
FaultPlan* the_plan = nullptr;
sqlite3_vfs* real_vfs = nullptr;

// A file of the shim; SQLite allocates the real one's bytes behind it.
struct ShimFile {
  sqlite3_file base;

  sqlite3_file* real() { return reinterpret_cast<sqlite3_file*>(this + 1); }
};

ShimFile* Shim(sqlite3_file* file) { return reinterpret_cast<ShimFile*>(file); }
sqlite3_file* Real(sqlite3_file* file) { return Shim(file)->real(); }

// `full` and `broken` are what SQLite's own code answers then.
int Fail(int full, int broken) {
  const bool is_broken = the_plan->failure == Failure::kBroken;
  errno = is_broken ? EIO : ENOSPC;
  return is_broken ? broken : full;
}

bool Strikes(const char* operation, bool is_write = false) {
  return the_plan->Strikes(absl::StrCat("sqlite ", operation), is_write);
}

// A full disk does not keep anyone from reading or deleting.
bool StrikesUnlessFull(const char* operation) {
  return the_plan->failure != Failure::kFull && Strikes(operation);
}

int Close(sqlite3_file* file) { return Real(file)->pMethods->xClose(Real(file)); }

int Read(sqlite3_file* file, void* to, int bytes, sqlite3_int64 offset) {
  if (StrikesUnlessFull("read")) return Fail(SQLITE_IOERR_READ, SQLITE_IOERR_READ);
  return Real(file)->pMethods->xRead(Real(file), to, bytes, offset);
}

int Write(sqlite3_file* file, const void* from, int bytes, sqlite3_int64 offset) {
  const auto* methods = Real(file)->pMethods;
  if (!Strikes("write", true)) return methods->xWrite(Real(file), from, bytes, offset);
  if (the_plan->WantsHalf()) methods->xWrite(Real(file), from, bytes / 2, offset);
  if (the_plan->failure == Failure::kCrashHalfWritten) _exit(kCrashed);
  return Fail(SQLITE_FULL, SQLITE_IOERR_WRITE);
}

int Truncate(sqlite3_file* file, sqlite3_int64 size) {
  if (Strikes("truncate")) return Fail(SQLITE_IOERR_TRUNCATE, SQLITE_IOERR_TRUNCATE);
  return Real(file)->pMethods->xTruncate(Real(file), size);
}

int Sync(sqlite3_file* /*file*/, int /*flags*/) {
  return Strikes("sync") ? Fail(SQLITE_IOERR_FSYNC, SQLITE_IOERR_FSYNC) : SQLITE_OK;
}

int FileSize(sqlite3_file* file, sqlite3_int64* size) {
  return Real(file)->pMethods->xFileSize(Real(file), size);
}
int Lock(sqlite3_file* file, int level) { return Real(file)->pMethods->xLock(Real(file), level); }
int Unlock(sqlite3_file* file, int level) {
  return Real(file)->pMethods->xUnlock(Real(file), level);
}
int CheckReservedLock(sqlite3_file* file, int* result) {
  return Real(file)->pMethods->xCheckReservedLock(Real(file), result);
}
int FileControl(sqlite3_file* file, int operation, void* argument) {
  return Real(file)->pMethods->xFileControl(Real(file), operation, argument);
}
int SectorSize(sqlite3_file* file) { return Real(file)->pMethods->xSectorSize(Real(file)); }
int Characteristics(sqlite3_file* file) {
  return Real(file)->pMethods->xDeviceCharacteristics(Real(file));
}

// Version 1: without shared memory, which the store does not use.
constexpr sqlite3_io_methods kMethods = {1,
                                         Close,
                                         Read,
                                         Write,
                                         Truncate,
                                         Sync,
                                         FileSize,
                                         Lock,
                                         Unlock,
                                         CheckReservedLock,
                                         FileControl,
                                         SectorSize,
                                         Characteristics,
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         nullptr};

int Open(sqlite3_vfs* /*vfs*/, const char* name, sqlite3_file* file, int flags, int* out_flags) {
  file->pMethods = nullptr;
  if (Strikes("open")) return Fail(SQLITE_CANTOPEN, SQLITE_CANTOPEN);
  const int code = real_vfs->xOpen(real_vfs, name, Real(file), flags, out_flags);
  if (Real(file)->pMethods != nullptr) file->pMethods = &kMethods;
  return code;
}

int Delete(sqlite3_vfs* /*vfs*/, const char* name, int sync_directory) {
  if (StrikesUnlessFull("delete")) return Fail(SQLITE_IOERR_DELETE, SQLITE_IOERR_DELETE);
  return real_vfs->xDelete(real_vfs, name, sync_directory);
}

}  // namespace

std::string FailureName(const ::testing::TestParamInfo<Failure>& info) {
  switch (info.param) {
    case Failure::kFull:
      return "Full";
    case Failure::kBroken:
      return "Broken";
    case Failure::kHalfWritten:
      return "HalfWritten";
    case Failure::kCrash:
      return "CrashBeforeIt";
    case Failure::kCrashHalfWritten:
      return "CrashHalfWayThroughAWrite";
    case Failure::kNone:
      break;
  }
  return "None";
}

bool FaultPlan::Strikes(const std::string& operation, bool is_write) {
  trace.push_back(operation);
  if (failure == Failure::kNone || (WantsHalf() && !is_write)) return false;
  if (struck) return lasting;
  if (left-- > 0) return false;
  struck = true;
  if (failure == Failure::kCrash) _exit(kCrashed);
  return true;
}

int FaultyDisk::Interfere(absl::string_view call, size_t& bytes) {
  if (plan_.half_done) {
    plan_.half_done = false;
    if (plan_.failure == Failure::kCrashHalfWritten) _exit(kCrashed);
    return ENOSPC;
  }
  // What lasts is SQLite's.
  if (plan_.struck && plan_.lasting) return 0;
  if (!plan_.Strikes(std::string(call), call == "write" || call == "pwrite")) return 0;
  if (plan_.WantsHalf()) {
    bytes /= 2;
    plan_.half_done = true;
    return 0;
  }
  return plan_.failure == Failure::kBroken ? EIO : ENOSPC;
}

const char* FaultyVfs(FaultPlan& plan) {
  static sqlite3_vfs vfs;
  the_plan = &plan;
  if (real_vfs == nullptr) {
    real_vfs = sqlite3_vfs_find(nullptr);
    vfs = *real_vfs;
    vfs.pNext = nullptr;
    vfs.zName = kVfsName;
    vfs.szOsFile = static_cast<int>(sizeof(ShimFile)) + real_vfs->szOsFile;
    vfs.xOpen = Open;
    vfs.xDelete = Delete;
    sqlite3_vfs_register(&vfs, /*makeDflt=*/0);
  }
  return kVfsName;
}

}  // namespace certiq::server::testing
