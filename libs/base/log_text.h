#pragma once

#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"

namespace orrery {

// For between quotes in a log line: on one line, at most 500 bytes of it, with quotes and whatever is not ASCII's letters, digits
// and signs escaped. Errors may repeat what a request said.
inline std::string LogText(absl::string_view text) {
  return absl::StrReplaceAll(absl::CEscape(text.substr(0, 500)), {{"\\'", "'"}});
}

}  // namespace orrery
