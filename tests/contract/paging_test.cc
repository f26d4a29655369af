#include "contract/paging.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/status.h"

namespace certiq::server {
namespace {

// As a catalog has it: newest first, ids break ties.
class Item {
 public:
  Item() = default;
  Item(base::UnixMicros time, std::string id, int64_t bytes = 10)
      : key_(time, std::move(id)), bytes_(bytes) {}
  size_t ByteSizeLong() const { return static_cast<size_t>(bytes_); }
  base::UnixMicros create_time() const { return key_.first; }
  const std::string& id() const { return key_.second; }
  const std::pair<base::UnixMicros, std::string>& key() const { return key_; }
  bool operator==(const Item&) const = default;

 private:
  std::pair<base::UnixMicros, std::string> key_;
  int64_t bytes_ = 0;
};

// Every third has the time of the one before.
std::vector<Item> Items(int count) {
  std::vector<Item> items;
  items.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    items.emplace_back(1000 + i - (i % 3 == 2 ? 1 : 0), absl::StrCat("id.", i));
  }
  return items;
}

std::vector<Item> NewestFirst(std::vector<Item> items) {
  std::sort(items.begin(), items.end(),
            [](const Item& a, const Item& b) { return a.key() > b.key(); });
  return items;
}

struct Page {
  std::vector<Item> items;
  std::string next_page_token;
};

// What a list answers, whose catalog finds one item more than the page is asked for, and none
// behind the one with which they have too many bytes.
absl::StatusOr<Page> Cut(const std::vector<Item>& all, int32_t size, const std::string& token) {
  const absl::StatusOr<PageRequest> request = ReadPageRequest(size, token);
  if (!request.ok()) return request.status();
  Page page;
  int64_t bytes = 0;
  for (const Item& item : NewestFirst(all)) {
    if (request->after.has_value() && item.key() >= *request->after) continue;
    if (static_cast<int64_t>(page.items.size()) > request->size || bytes > kMaxPageBytes) break;
    page.items.push_back(item);
    bytes += static_cast<int64_t>(item.ByteSizeLong());
  }
  page.next_page_token = CutPage(*request, page.items);
  return page;
}

TEST(PagingTest, PagesHoldEverythingOnceNewestFirst) {
  for (const int count : {0, 1, 6, 7, 8, 30}) {
    const std::vector<Item> expected = NewestFirst(Items(count));
    for (const int32_t size : {1, 2, 7, 30, 31}) {
      std::vector<Item> seen;
      std::string token;
      int pages = 0;
      do {
        const auto page = Cut(Items(count), size, token);
        ASSERT_TRUE(page.ok()) << page.status();
        EXPECT_LE(page->items.size(), static_cast<size_t>(size));
        seen.insert(seen.end(), page->items.begin(), page->items.end());
        token = page->next_page_token;
        ASSERT_LE(++pages, count + 1);
      } while (!token.empty());
      EXPECT_EQ(seen, expected);
      EXPECT_EQ(pages, std::max(1, (count + size - 1) / size));
    }
  }
}

TEST(PagingTest, PagesHaveALimitOfBytes) {
  for (const int64_t bytes : {kMaxPageBytes / 10, kMaxPageBytes / 2, kMaxPageBytes - 1,
                              kMaxPageBytes, kMaxPageBytes + 1, 3 * kMaxPageBytes}) {
    std::vector<Item> all;
    all.reserve(25);
    for (int i = 0; i < 25; ++i) all.emplace_back(1000 + i, absl::StrCat("id", i), bytes);
    std::vector<Item> seen;
    std::string token;
    do {
      const auto page = Cut(all, 1000, token);
      ASSERT_TRUE(page.ok()) << page.status();
      const auto items = static_cast<int64_t>(page->items.size());
      EXPECT_TRUE(items <= 1 || items * bytes <= kMaxPageBytes) << items << " of " << bytes;
      seen.insert(seen.end(), page->items.begin(), page->items.end());
      token = page->next_page_token;
      ASSERT_LE(seen.size(), all.size());
    } while (!token.empty());
    EXPECT_EQ(seen, NewestFirst(all));
  }
}

TEST(PagingTest, SizesHaveADefaultAndALimit) {
  EXPECT_EQ(Cut(Items(60), 0, "")->items.size(), static_cast<size_t>(kDefaultPageSize));
  EXPECT_EQ(Cut(Items(1200), 1100, "")->items.size(), static_cast<size_t>(kMaxPageSize));
  const absl::Status negative = ReadPageRequest(-1, "").status();
  EXPECT_TRUE(absl::IsInvalidArgument(negative));
  EXPECT_EQ(base::FieldOf(negative), "page_size");
}

TEST(PagingTest, WhatComesAndGoesShiftsNothing) {
  std::vector<Item> items = Items(10);
  const auto first = Cut(items, 4, "");
  ASSERT_TRUE(first.ok());
  const std::vector<Item> rest = Cut(items, 100, first->next_page_token)->items;
  // New ones, and the one that the token names is gone.
  items.erase(std::find(items.begin(), items.end(), first->items.back()));
  for (int i = 0; i < 5; ++i) items.emplace_back(5000 + i, absl::StrCat("new", i));
  EXPECT_EQ(Cut(items, 100, first->next_page_token)->items, rest);
}

TEST(PagingTest, TokensBeyondTheEndGiveAnEmptyPage) {
  const auto page = Cut(Items(5), 4, "0.a");
  ASSERT_TRUE(page.ok());
  EXPECT_TRUE(page->items.empty());
  EXPECT_TRUE(page->next_page_token.empty());
}

TEST(PagingTest, TokensSayWhereTheNextPageBegins) {
  const auto request = ReadPageRequest(3, PageTokenAfter(-17, "id.with.dots"));
  ASSERT_TRUE(request.ok());
  ASSERT_TRUE(request->after.has_value());
  EXPECT_EQ(*request->after, std::pair(base::UnixMicros{-17}, std::string("id.with.dots")));
  EXPECT_EQ(request->size, 3);
  EXPECT_FALSE(ReadPageRequest(3, "")->after.has_value());
}

TEST(PagingTest, OtherTokensAreRefused) {
  for (const std::string token :
       {".", "x.id", "12", "12.", "99999999999999999999.id", " ", "1e3.a"}) {
    const absl::Status refused = ReadPageRequest(4, token).status();
    EXPECT_TRUE(absl::IsInvalidArgument(refused)) << token;
    EXPECT_EQ(base::FieldOf(refused), "page_token") << token;
  }
}

}  // namespace
}  // namespace certiq::server
