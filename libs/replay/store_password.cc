#include "libs/replay/store_password.h"

#include <cstdlib>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "libs/base/file.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

std::string PercentEncode(absl::string_view text) {
  std::string out;
  for (const char c : text) {
    if (absl::ascii_isalnum(static_cast<unsigned char>(c))) {
      out += c;
    } else {
      absl::StrAppend(&out, absl::StrFormat("%%%02X", static_cast<unsigned char>(c)));
    }
  }
  return out;
}

// "redis://", then "[user[:password]@]", then the rest.
struct Parts {
  absl::string_view scheme;
  absl::string_view user;
  absl::string_view password;
  absl::string_view rest;
};

bool IsRedis(absl::string_view location, Parts& parts) {
  for (const absl::string_view scheme : {"redis://", "redis-cluster://"}) {
    if (!absl::StartsWith(location, scheme)) continue;
    parts.scheme = scheme;
    parts.rest = location.substr(scheme.size());
    const size_t at = parts.rest.rfind('@');
    if (at == absl::string_view::npos) return true;
    const absl::string_view login = parts.rest.substr(0, at);
    const size_t colon = login.find(':');
    parts.user = login.substr(0, colon);
    if (colon != absl::string_view::npos) parts.password = login.substr(colon + 1);
    parts.rest.remove_prefix(at + 1);
    return true;
  }
  return false;
}

std::string Joined(const Parts& parts, absl::string_view password) {
  return absl::StrCat(parts.scheme, parts.user, ":", PercentEncode(password), "@", parts.rest);
}

}  // namespace

absl::StatusOr<std::string> AddStorePassword(const std::string& location, const std::string& file) {
  Parts parts;
  const bool redis = IsRedis(location, parts);
  if (file.empty()) {
    const char* const variable = std::getenv(kStorePasswordVariable);
    const bool wanted = redis && parts.password.empty() && variable != nullptr && *variable != '\0';
    return wanted ? Joined(parts, variable) : location;
  }
  if (!redis) {
    return absl::InvalidArgumentError(
        absl::StrCat("the password in ", file, " is for a Redis: expected a location with redis:// or redis-cluster://"));
  }
  if (!parts.password.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the location of the store has a password and so has ", file, ": expected one"));
  }
  ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  const absl::string_view password = absl::StripSuffix(text, "\n");
  if (password.empty()) return absl::InvalidArgumentError(absl::StrCat(file, " is empty: expected the password of Redis"));
  return Joined(parts, password);
}

}  // namespace orrery
