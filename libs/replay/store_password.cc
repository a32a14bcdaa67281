#include "libs/replay/store_password.h"

#include <cstdlib>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/replay/redis_location.h"

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

std::string WithPassword(const RedisLocationText& location, absl::string_view password) {
  return absl::StrCat(location.scheme, location.user.value_or(""), ":", PercentEncode(password), "@", location.endpoints);
}

}  // namespace

absl::StatusOr<std::string> AddStorePassword(const std::string& location, const std::string& file) {
  const std::optional<RedisLocationText> redis = SplitRedisLocation(location);
  const bool has_password = redis.has_value() && !redis->password.value_or("").empty();
  if (file.empty()) {
    const char* const variable = std::getenv(kStorePasswordVariable);
    const bool wanted = redis.has_value() && !has_password && variable != nullptr && *variable != '\0';
    return wanted ? WithPassword(*redis, variable) : location;
  }
  if (!redis.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the password in ", file, " is for a Redis: expected a location with redis:// or redis-cluster://"));
  }
  if (has_password) {
    return absl::InvalidArgumentError(
        absl::StrCat("the location of the store has a password and so has ", file, ": expected one"));
  }
  ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  const absl::string_view password = absl::StripSuffix(text, "\n");
  if (password.empty()) return absl::InvalidArgumentError(absl::StrCat(file, " is empty: expected the password of Redis"));
  return WithPassword(*redis, password);
}

}  // namespace orrery
