// What every blob store does, in memory and in files.

#include "store/blobs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "store/disk.h"
#include "store/file_blobs.h"
#include "store/memory_blobs.h"
#include "store/reserve.h"
#include "store/store_examples.h"
#include "support/text.h"

namespace certiq::server::testing {
namespace {

constexpr int64_t kMebibyte = int64_t{1} << 20;

struct MemoryKind {
  static constexpr bool kDurable = false;
};
struct FilesKind {
  static constexpr bool kDurable = true;
};

template <typename Kind>
class BlobsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    disk_ = std::make_shared<Disk>(directory_.data());
    for (const char* name : {"", kBlobDirectory, kIncomingDirectory}) {
      ASSERT_TRUE(disk_->MakeDirectory(name).ok());
    }
    Reopen();
  }

  // As if the server had ended and started again; what is in memory stays.
  void Reopen() {
    if constexpr (Kind::kDurable) {
      blobs_ = MakeFileBlobs(disk_, std::make_shared<DiskReserve>(disk_));
    } else {
      if (blobs_ == nullptr) blobs_ = MakeMemoryBlobs();
    }
  }

  BlobRef MustWrite(std::span<const std::byte> bytes) {
    const auto blob = WriteBlob(*blobs_, bytes);
    EXPECT_TRUE(blob.ok()) << blob.status();
    return blob.ok() ? *blob : BlobRef();
  }

  TemporaryDirectory directory_;
  std::shared_ptr<Disk> disk_;
  std::unique_ptr<Blobs> blobs_;
};

struct BlobsKindNames {
  template <typename Kind>
  static std::string GetName(int) {
    return Kind::kDurable ? "InFiles" : "InMemory";
  }
};
using BlobsKinds = ::testing::Types<MemoryKind, FilesKind>;
TYPED_TEST_SUITE(BlobsTest, BlobsKinds, BlobsKindNames);

TYPED_TEST(BlobsTest, EverySizeComesBackInAnyRange) {
  const int64_t sizes[] = {
      0, 1, 4095, kMebibyte - 1, kMebibyte, kMebibyte + 1, 2 * kMebibyte, 3 * kMebibyte + 12'345};
  for (const int64_t size : sizes) {
    const std::vector<std::byte> bytes = Pattern("blob", size);
    const BlobRef blob = this->MustWrite(bytes);
    EXPECT_EQ(blob.bytes(), size);
    EXPECT_FALSE(blob.name().empty());
    this->Reopen();
    auto reader = this->blobs_->Open(blob);
    ASSERT_TRUE(reader.ok()) << reader.status();
    EXPECT_EQ((*reader)->bytes(), size);
    const int64_t ends[] = {
        0, 1, size / 3, kMebibyte - 1, kMebibyte, kMebibyte + 1, 2 * kMebibyte, size - 1, size};
    for (const int64_t begin : ends) {
      for (const int64_t end : ends) {
        if (begin < 0 || end > size || begin > end) continue;
        std::vector<std::byte> part(static_cast<size_t>(end - begin));
        ASSERT_TRUE((*reader)->Read(begin, part).ok());
        EXPECT_TRUE(std::equal(part.begin(), part.end(), bytes.begin() + begin))
            << begin << " to " << end << " of " << size;
      }
    }
  }
}

TYPED_TEST(BlobsTest, NamesAreNeverTheSame) {
  std::set<std::string> names;
  for (int i = 0; i < 50; ++i) names.insert(this->MustWrite({}).name());
  EXPECT_EQ(names.size(), 50u);
}

TYPED_TEST(BlobsTest, ReaderOutlivesItsBlob) {
  const std::vector<std::byte> bytes = Pattern("gone", 2 * kMebibyte);
  const BlobRef blob = this->MustWrite(bytes);
  auto reader = this->blobs_->Open(blob);
  ASSERT_TRUE(reader.ok());
  this->blobs_->Remove(blob);
  this->blobs_->Remove(blob);
  std::vector<std::byte> read(bytes.size());
  EXPECT_TRUE((*reader)->Read(0, read).ok());
  EXPECT_TRUE(read == bytes);
  EXPECT_TRUE(absl::IsDataLoss(this->blobs_->Open(blob).status()));
}

TYPED_TEST(BlobsTest, MissingBlobIsDataLoss) {
  for (const BlobRef& blob :
       {MakeBlobRef(std::string(32, 'a'), 5), MakeBlobRef("../../../../etc/passwd", 5),
        MakeBlobRef(std::string(31, 'a') + '\0', 5), BlobRef()}) {
    const absl::Status lost = this->blobs_->Open(blob).status();
    EXPECT_TRUE(absl::IsDataLoss(lost)) << lost;
    this->blobs_->Remove(blob);
  }
}

TYPED_TEST(BlobsTest, WrongSizeInARecordIsDataLoss) {
  BlobRef blob = this->MustWrite(Pattern("x", 1000));
  for (const int64_t size : {int64_t{0}, int64_t{999}, int64_t{1001}, int64_t{-1},
                             std::numeric_limits<int64_t>::max()}) {
    blob.set_bytes(size);
    EXPECT_TRUE(absl::IsDataLoss(this->blobs_->Open(blob).status())) << size;
  }
}

TYPED_TEST(BlobsTest, WhatWasNotCommittedVanishesWithItsWriter) {
  const BlobRef kept = this->MustWrite(Pattern("kept", 10));
  {
    auto writer = this->blobs_->Create();
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE((*writer)->Append(Pattern("vanishes", 2 * kMebibyte)).ok());
  }
  EXPECT_TRUE(NamesIn(this->directory_.data() + "/incoming").empty());
  EXPECT_TRUE(ReadBlob(*this->blobs_, kept).ok());
}

TYPED_TEST(BlobsTest, RemoveAllButKeepsWhatIsNamed) {
  const std::vector<std::byte> bytes = Pattern("kept", 1000);
  const BlobRef kept = this->MustWrite(bytes);
  const BlobRef orphan = this->MustWrite(bytes);
  // A record without a blob brings an empty name; one whose blob is gone is no error.
  ASSERT_TRUE(this->blobs_->RemoveAllBut({kept.name(), "", std::string(32, 'b')}).ok());
  EXPECT_TRUE(absl::IsDataLoss(this->blobs_->Open(orphan).status()));
  const auto read = ReadBlob(*this->blobs_, kept);
  EXPECT_TRUE(read.ok() && *read == bytes) << read.status();
  ASSERT_TRUE(this->blobs_->RemoveAllBut({}).ok());
  EXPECT_TRUE(absl::IsDataLoss(this->blobs_->Open(kept).status()));
}

TYPED_TEST(BlobsTest, ThreadsDoNotDisturbEachOther) {
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int64_t t = 0; t < 4; ++t) {
    threads.emplace_back([this, t] {
      const std::vector<std::byte> bytes = Pattern(std::to_string(t), kMebibyte + t);
      BlobRef last;
      for (int64_t round = 0; round < 12; ++round) {
        const BlobRef blob = this->MustWrite(bytes);
        this->blobs_->Remove(last);
        const auto read = ReadBlob(*this->blobs_, blob);
        EXPECT_TRUE(read.ok() && *read == bytes);
        last = blob;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TYPED_TEST(BlobsTest, ThreadsShareAReader) {
  const std::vector<std::byte> bytes = Pattern("shared", 2 * kMebibyte + 1);
  auto reader = this->blobs_->Open(this->MustWrite(bytes));
  ASSERT_TRUE(reader.ok());
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t at = t; at + 1000 < bytes.size(); at += 300'007) {
        std::vector<std::byte> part(1000);
        EXPECT_TRUE((*reader)->Read(static_cast<int64_t>(at), part).ok());
        EXPECT_TRUE(
            std::equal(part.begin(), part.end(), bytes.begin() + static_cast<ptrdiff_t>(at)));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(FileBlobsTest, NamesAre128RandomBits) {
  EXPECT_TRUE(IsBlobName("0123456789abcdef0123456789abcdef"));
  for (const std::string& name :
       {std::string(), std::string(31, 'a'), std::string(33, 'a'), std::string(32, 'A'),
        std::string(32, 'g'), std::string(31, 'a') + '/', std::string(31, 'a') + '\0'}) {
    EXPECT_FALSE(IsBlobName(name)) << name;
  }
}

}  // namespace
}  // namespace certiq::server::testing
