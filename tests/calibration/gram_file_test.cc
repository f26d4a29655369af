// Stored sums are those that were written, with what is known of massive tokens and without.

#include "calibration/gram_file.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>

#include "store/memory_blobs.h"

namespace certiq::server::testing {
namespace {

constexpr int64_t kWidth = 3;

engine::Statistics SomeSums(double first, bool mismatched) {
  engine::Statistics sums;
  sums.gram = engine::UpperTriangle<double>(kWidth);
  double next = first;
  for (int64_t i = 0; i < kWidth; ++i) {
    for (int64_t j = i; j < kWidth; ++j) sums.gram.at(i, j) = next++;
  }
  if (!mismatched) return sums;
  engine::MismatchSums& mismatch = sums.mismatch.emplace();
  mismatch.residual = engine::UpperTriangle<double>(kWidth);
  for (int64_t i = 0; i < kWidth; ++i) {
    for (int64_t j = i; j < kWidth; ++j) mismatch.residual.at(i, j) = next++;
  }
  for (int64_t i = 0; i < kWidth * kWidth; ++i) mismatch.cross.push_back(next++);
  return sums;
}

void ExpectSame(const engine::Statistics& a, const engine::Statistics& b) {
  for (int64_t i = 0; i < kWidth; ++i) {
    for (int64_t j = i; j < kWidth; ++j) EXPECT_EQ(a.gram.at(i, j), b.gram.at(i, j));
  }
  EXPECT_EQ(a.massive_squares, b.massive_squares);
  ASSERT_EQ(a.mismatch.has_value(), b.mismatch.has_value());
  if (!a.mismatch.has_value()) return;
  EXPECT_EQ(a.mismatch->cross, b.mismatch->cross);
  EXPECT_EQ(a.mismatch->massive_squares, b.mismatch->massive_squares);
}

TEST(GramFileTest, SumsComeBackAsTheyWere) {
  const std::unique_ptr<Blobs> blobs = MakeMemoryBlobs();
  for (const bool mismatched : {false, true}) {
    for (const bool held_out : {false, true}) {
      // Bit 0: the tokens to fit have massive ones, 1: their P has, 2: the held-out tokens have.
      for (int massive = 0; massive < 8; ++massive) {
        engine::Statistics fit = SomeSums(1, mismatched);
        engine::Statistics held = SomeSums(100, mismatched);
        if ((massive & 1) != 0) fit.massive_squares = {1, 0, 2};
        if ((massive & 2) != 0 && mismatched) fit.mismatch->massive_squares = {0, 3, 0};
        if ((massive & 4) != 0) held.massive_squares = {4, 5, 6};
        CalibrationRecord record;
        record.set_features(kWidth);
        record.set_mismatched(mismatched);
        record.set_held_out_fraction(held_out ? 0.5 : 0);
        const auto stored = WriteSums(*blobs, fit, held_out ? &held : nullptr);
        ASSERT_TRUE(stored.ok()) << stored.status();
        *record.mutable_sums() = stored->blob;
        const auto loaded = ReadSums(*blobs, record);
        ASSERT_TRUE(loaded.ok()) << loaded.status();
        ExpectSame(loaded->fit, fit);
        ASSERT_EQ(loaded->held_out.has_value(), held_out);
        if (held_out) ExpectSame(*loaded->held_out, held);
        // Without massive tokens the bytes are those that earlier versions wrote and read.
        const auto reader = blobs->Open(stored->blob);
        ASSERT_TRUE(reader.ok()) << reader.status();
        const bool none = fit.massive_squares.empty() &&
                          (!mismatched || fit.mismatch->massive_squares.empty()) &&
                          (!held_out || held.massive_squares.empty());
        EXPECT_EQ((*reader)->bytes() == SumsBytes(record), none);
      }
    }
  }
}

}  // namespace
}  // namespace certiq::server::testing
