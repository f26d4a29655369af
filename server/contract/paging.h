// Pages of lists (AIP-158).

#ifndef CERTIQ_CONTRACT_PAGING_H_
#define CERTIQ_CONTRACT_PAGING_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"

namespace certiq::server {

inline constexpr int32_t kDefaultPageSize = 50;
inline constexpr int32_t kMaxPageSize = 1000;
// The records of one page, unless one alone has more: clients take 4 MiB.
inline constexpr int64_t kMaxPageBytes = int64_t{1} << 20;

// A page that was asked for.
struct PageRequest {
  int64_t size = kDefaultPageSize;
  // Creation time and id of the last item of the page before.
  std::optional<std::pair<base::UnixMicros, std::string>> after;
};

// INVALID_ARGUMENT for a bad size or token.
absl::StatusOr<PageRequest> ReadPageRequest(int32_t page_size, const std::string& page_token);

// The token of the page behind this item.
std::string PageTokenAfter(base::UnixMicros create_time, const std::string& id);

// Cuts `items`, of which one more than the page was asked for, to the page: so many records and,
// but for the first, so many bytes. Returns the token of the next page, empty on the last.
template <typename Record>
std::string CutPage(const PageRequest& request, std::vector<Record>& items) {
  size_t kept = 0;
  int64_t bytes = 0;
  for (const Record& item : items) {
    bytes += static_cast<int64_t>(item.ByteSizeLong());
    if (kept > 0 && bytes > kMaxPageBytes) break;
    if (static_cast<int64_t>(kept) == request.size) break;
    ++kept;
  }
  // Whoever read the items stopped behind the one that had too many bytes.
  if (kept == items.size() && bytes <= kMaxPageBytes) return "";
  items.resize(kept);
  return PageTokenAfter(items.back().create_time(), items.back().id());
}

}  // namespace certiq::server

#endif  // CERTIQ_CONTRACT_PAGING_H_
