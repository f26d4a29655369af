#include "contract/paging.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status.h"

namespace certiq::server {

absl::StatusOr<PageRequest> ReadPageRequest(int32_t page_size, const std::string& page_token) {
  if (page_size < 0) {
    return base::InvalidField("page_size", absl::StrCat("expected at least 0, got ", page_size));
  }
  PageRequest request;
  if (page_size > 0) request.size = std::min(page_size, kMaxPageSize);
  if (page_token.empty()) return request;
  std::pair<std::string, std::string> parts = absl::StrSplit(page_token, absl::MaxSplits('.', 1));
  base::UnixMicros time = 0;
  if (!absl::SimpleAtoi(parts.first, &time) || parts.second.empty()) {
    return base::InvalidField("page_token", "expected a next_page_token of this list");
  }
  request.after.emplace(time, std::move(parts.second));
  return request;
}

std::string PageTokenAfter(base::UnixMicros create_time, const std::string& id) {
  return absl::StrCat(create_time, ".", id);
}

}  // namespace certiq::server
