// EXPECT_CONTAINS for messages (the build has no GoogleMock).

#ifndef CERTIQ_TESTS_SUPPORT_TEXT_H_
#define CERTIQ_TESTS_SUPPORT_TEXT_H_

#include <gtest/gtest.h>

#include <string>

namespace certiq::testing {

inline ::testing::AssertionResult Contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "\"" << text << "\" does not contain \"" << part << "\"";
}

}  // namespace certiq::testing

#define EXPECT_CONTAINS(text, part) \
  EXPECT_TRUE(::certiq::testing::Contains(std::string(text), part))

#endif  // CERTIQ_TESTS_SUPPORT_TEXT_H_
