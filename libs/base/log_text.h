#pragma once

#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"

namespace orrery {

// For between quotes in a log line: on one line, quotes and control characters escaped, at most 500 bytes of it. Errors may
// repeat what a request said.
inline std::string LogText(absl::string_view text) {
  return absl::StrReplaceAll(absl::Utf8SafeCEscape(text.substr(0, 500)), {{"\\'", "'"}});
}

}  // namespace orrery
