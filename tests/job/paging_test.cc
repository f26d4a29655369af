#include "job/paging.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"

namespace certiq::server {
namespace {

using Item = std::pair<base::UnixMicros, std::string>;

absl::StatusOr<Page<Item>> Cut(std::vector<Item> all, int32_t size, const std::string& token) {
  return CutPage(std::move(all), size, token, [](const Item& item) { return item; });
}

// Every third has the time of the one before.
std::vector<Item> Items(int count) {
  std::vector<Item> items;
  items.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    items.emplace_back(1000 + i - (i % 3 == 2 ? 1 : 0), absl::StrCat("id.", i));
  }
  return items;
}

TEST(PagingTest, PagesHoldEverythingOnceNewestFirst) {
  for (const int count : {0, 1, 6, 7, 8, 30}) {
    std::vector<Item> expected = Items(count);
    std::sort(expected.rbegin(), expected.rend());
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

TEST(PagingTest, SizesHaveADefaultAndALimit) {
  EXPECT_EQ(Cut(Items(60), 0, "")->items.size(), static_cast<size_t>(kDefaultPageSize));
  EXPECT_EQ(Cut(Items(1200), 1100, "")->items.size(), static_cast<size_t>(kMaxPageSize));
  EXPECT_TRUE(absl::IsInvalidArgument(Cut(Items(3), -1, "").status()));
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

TEST(PagingTest, OtherTokensAreRefused) {
  for (const std::string token :
       {".", "x.id", "12", "12.", "99999999999999999999.id", " ", "1e3.a"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(Cut(Items(5), 4, token).status())) << token;
  }
}

}  // namespace
}  // namespace certiq::server
