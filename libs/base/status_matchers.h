// gMock matchers for absl::Status and absl::StatusOr: IsOk(), IsOkAndHolds(m), StatusIs(code[, message matcher]).
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace orrery {
inline const absl::Status& GetStatus(const absl::Status& s) { return s; }
template <typename T>
const absl::Status& GetStatus(const absl::StatusOr<T>& s) {
  return s.status();
}

MATCHER(IsOk, "is OK") {
  *result_listener << GetStatus(arg).ToString();
  return GetStatus(arg).ok();
}

MATCHER_P(StatusIs, code, "") {
  *result_listener << GetStatus(arg).ToString();
  return GetStatus(arg).code() == code;
}

MATCHER_P2(StatusIs, code, message, "") {
  *result_listener << GetStatus(arg).ToString();
  return GetStatus(arg).code() == code &&
         ::testing::ExplainMatchResult(message, std::string(GetStatus(arg).message()), result_listener);
}

MATCHER_P(IsOkAndHolds, matcher, "") {
  if (!arg.ok()) {
    *result_listener << arg.status().ToString();
    return false;
  }
  return ::testing::ExplainMatchResult(matcher, *arg, result_listener);
}
}  // namespace orrery

#define ORRERY_TEST_CONCAT_INNER(a, b) a##b
#define ORRERY_TEST_CONCAT(a, b) ORRERY_TEST_CONCAT_INNER(a, b)
#define ASSERT_OK(expression) ASSERT_THAT(expression, ::orrery::IsOk())
#define EXPECT_OK(expression) EXPECT_THAT(expression, ::orrery::IsOk())
// ASSERT_OK_AND_ASSIGN(auto x, F()): fails the test unless F() is OK.
#define ASSERT_OK_AND_ASSIGN(lhs, expression) \
  ASSERT_OK_AND_ASSIGN_INNER(ORRERY_TEST_CONCAT(test_status_or_, __LINE__), lhs, expression)
#define ASSERT_OK_AND_ASSIGN_INNER(tmp, lhs, expression) \
  auto tmp = (expression);                               \
  ASSERT_THAT(tmp, ::orrery::IsOk());                    \
  lhs = std::move(tmp).value()
