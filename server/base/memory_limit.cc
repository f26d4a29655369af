#include "base/memory_limit.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

namespace certiq::base {
namespace {

// The number in a file of the control group file system; `otherwise` if the file is missing or
// says "max".
int64_t ReadLimit(const std::filesystem::path& file, int64_t otherwise) {
  std::ifstream in(file);
  int64_t limit = 0;
  return in >> limit && limit > 0 ? limit : otherwise;
}

// Path of this process's group inside the version 2 hierarchy; "/" if it is unknown.
std::filesystem::path GroupPath() {
  std::ifstream in("/proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("0::", 0) == 0) return line.substr(3);
  }
  return "/";
}

}  // namespace

int64_t MemoryLimitBytes() {
  int64_t limit = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  const std::filesystem::path root = "/sys/fs/cgroup";
  limit = std::min(limit, ReadLimit(root / "memory" / "memory.limit_in_bytes", limit));
  // The limits of all enclosing groups hold too.
  for (std::filesystem::path group = GroupPath().relative_path();; group = group.parent_path()) {
    limit = std::min(limit, ReadLimit(root / group / "memory.max", limit));
    if (group.empty()) break;
  }
  return limit;
}

}  // namespace certiq::base
