// Regular expression assertion; apart from test_util.h because <regex> is slow to compile.
#ifndef CERTIQ_TESTS_CLIENT_REGEX_MATCH_H_
#define CERTIQ_TESTS_CLIENT_REGEX_MATCH_H_

#include <regex>
#include <string>

#include "absl/strings/string_view.h"
#include "gtest/gtest.h"

namespace certiq::testing {

inline ::testing::AssertionResult Matches(absl::string_view text, const std::string& pattern) {
  if (std::regex_match(std::string(text), std::regex(pattern))) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "\"" << text << "\" does not match " << pattern;
}

}  // namespace certiq::testing

#endif  // CERTIQ_TESTS_CLIENT_REGEX_MATCH_H_
