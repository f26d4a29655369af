// Lists in pages (AIP-158).

#ifndef CERTIQ_JOB_PAGING_H_
#define CERTIQ_JOB_PAGING_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/clock.h"
#include "base/status.h"
#include "store/store.h"

namespace certiq::server {

inline constexpr int32_t kDefaultPageSize = 50;
inline constexpr int32_t kMaxPageSize = 1000;

template <typename T>
struct Page {
  std::vector<T> items;
  // Empty on the last page.
  std::string next_page_token;
};

// Cuts the page that the token names out of `all`, newest first. `key` gives (create time, id),
// which is all that a token holds: things that come and go between two pages shift nothing.
// INVALID_ARGUMENT for a bad size or token.
template <typename T, typename Key>
absl::StatusOr<Page<T>> CutPage(std::vector<T> all, int32_t page_size,
                                const std::string& page_token, const Key& key) {
  if (page_size < 0) {
    return base::InvalidField("page_size", absl::StrCat("expected at least 0, got ", page_size));
  }
  const auto size =
      static_cast<size_t>(page_size == 0 ? kDefaultPageSize : std::min(page_size, kMaxPageSize));
  std::sort(all.begin(), all.end(), [&](const T& a, const T& b) { return key(a) > key(b); });
  auto begin = all.begin();
  if (!page_token.empty()) {
    const std::pair<std::string, std::string> parts =
        absl::StrSplit(page_token, absl::MaxSplits('.', 1));
    base::UnixMicros time = 0;
    if (!absl::SimpleAtoi(parts.first, &time) || parts.second.empty()) {
      return base::InvalidField("page_token", "expected a next_page_token of this list");
    }
    const std::pair<base::UnixMicros, std::string> last(time, parts.second);
    begin = std::find_if(all.begin(), all.end(), [&](const T& item) { return key(item) < last; });
  }
  Page<T> page;
  const auto left = static_cast<size_t>(all.end() - begin);
  page.items.assign(
      std::make_move_iterator(begin),
      std::make_move_iterator(begin + static_cast<std::ptrdiff_t>(std::min(size, left))));
  if (left > size) {
    const auto [time, id] = key(page.items.back());
    page.next_page_token = absl::StrCat(time, ".", id);
  }
  return page;
}

}  // namespace certiq::server

#endif  // CERTIQ_JOB_PAGING_H_
