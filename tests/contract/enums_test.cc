#include "contract/enums.h"

#include <gtest/gtest.h>

#include <set>

#include "tests/support/text.h"

namespace certiq::server {
namespace {

// Each value of the wire but UNSPECIFIED is in the table once and comes back.
template <typename Wire, typename Ours, size_t N>
void ExpectWhole(const EnumTable<Wire, Ours, N>& table) {
  std::set<Ours> ours;
  for (const auto& [wire, value] : table) {
    EXPECT_NE(static_cast<int>(wire), 0);
    EXPECT_EQ(ToWire(value, table), wire);
    const auto back = FromWire(wire, table, "field");
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(*back, value);
    ours.insert(value);
  }
  EXPECT_EQ(ours.size(), N);
  const auto* const wire = google::protobuf::GetEnumDescriptor<Wire>();
  EXPECT_EQ(static_cast<size_t>(wire->value_count()), N + 1) << wire->name();
}

TEST(EnumsTest, TablesAreWhole) {
  ExpectWhole(kMethods);
  ExpectWhole(kGroupScales);
  ExpectWhole(kScaleRules);
  ExpectWhole(kScaleObjectives);
  ExpectWhole(kRoundings);
  ExpectWhole(kOrders);
  ExpectWhole(kOnFailures);
  ExpectWhole(kFormats);
  ExpectWhole(kQualities);
  ExpectWhole(kDataTypes);
  ExpectWhole(kCauses);
  ExpectWhole(kOutcomes);
  ExpectWhole(kPhases);
}

TEST(EnumsTest, WhatIsNotInTheTableIsRefused) {
  const absl::Status unset = FromWire(v1::METHOD_UNSPECIFIED, kMethods, "spec.method").status();
  EXPECT_EQ(base::FieldOf(unset), "spec.method");
  EXPECT_CONTAINS(unset.message(), "expected one of METHOD_NEAREST, METHOD_OPTQ, METHOD_QRONOS");
  EXPECT_CONTAINS(unset.message(), "got METHOD_UNSPECIFIED");
  EXPECT_CONTAINS(FromWire(static_cast<v1::Method>(99), kMethods, "spec.method").status().message(),
                  "got the unknown number 99");
}

}  // namespace
}  // namespace certiq::server
