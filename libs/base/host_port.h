// Addresses "HOST:PORT", as flags and locations give them.
#pragma once

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace orrery {

struct HostPort {
  std::string host;  // without the brackets of "[::1]:PORT"; empty: none was given
  int port = 0;      // 0 to 65535
  // "HOST:PORT", with brackets where the host holds colons.
  std::string text() const;
};

// "HOST:PORT", "[HOST]:PORT", ":PORT" or "PORT"; the last colon ends a host without brackets. nullopt: anything else, or a port
// above 65535.
std::optional<HostPort> ParseHostPort(absl::string_view text);

}  // namespace orrery
