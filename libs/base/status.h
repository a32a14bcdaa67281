// Macros around absl::Status, and the one place where exceptions become statuses.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

#define ORRERY_STATUS_CONCAT_INNER(a, b) a##b
#define ORRERY_STATUS_CONCAT(a, b) ORRERY_STATUS_CONCAT_INNER(a, b)

// Returns the status of `expression` from the enclosing function unless it is OK.
#define RETURN_IF_ERROR(expression)                                       \
  do {                                                                    \
    if (::absl::Status status_macro_ = (expression); !status_macro_.ok()) \
      return status_macro_;                                               \
  } while (false)

// ASSIGN_OR_RETURN(auto x, F()): x = value of F(), or returns its status.
#define ASSIGN_OR_RETURN(lhs, expression) \
  ASSIGN_OR_RETURN_INNER(ORRERY_STATUS_CONCAT(status_or_, __LINE__), lhs, expression)
#define ASSIGN_OR_RETURN_INNER(tmp, lhs, expression) \
  auto tmp = (expression);                           \
  if (!tmp.ok()) return tmp.status();                \
  lhs = std::move(tmp).value()

namespace orrery {

// The same status with "`context`: " before its message; OK stays OK.
inline absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

// Runs `f` (returning Status or StatusOr) and turns an exception into INTERNAL. LibTorch throws c10::Error, which is a
// std::exception; this is the adapter for every call into it that may fail on data.
template <typename F>
auto CatchExceptions(absl::string_view what, F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::exception& e) {
    // LibTorch appends a C++ backtrace, which says nothing to a user.
    const absl::string_view message(e.what());
    return absl::InternalError(absl::StrCat(what, ": ", message.substr(0, message.find("\nException raised from"))));
  }
}

}  // namespace orrery
