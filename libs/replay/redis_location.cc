#include "libs/replay/redis_location.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

absl::Status NotALocation() {
  return absl::InvalidArgumentError(
      "location of Redis: expected redis://[user:password@]HOST:PORT or redis-cluster://[user:password@]HOST:PORT[,HOST:PORT…]");
}

absl::StatusOr<std::string> PercentDecode(absl::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    uint32_t value = 0;
    if (i + 2 >= text.size() || !absl::SimpleHexAtoi(text.substr(i + 1, 2), &value)) {
      return absl::InvalidArgumentError("user or password of a location of Redis: '%' must be followed by two hexadecimal digits");
    }
    out += static_cast<char>(value);
    i += 2;
  }
  return out;
}

absl::StatusOr<RedisEndpoint> ParseEndpoint(absl::string_view text) {
  RedisEndpoint endpoint;
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos || !absl::SimpleAtoi(text.substr(colon + 1), &endpoint.port)) return NotALocation();
  absl::string_view host = text.substr(0, colon);
  if (absl::ConsumePrefix(&host, "[") && !absl::ConsumeSuffix(&host, "]")) return NotALocation();
  if (host.empty() || endpoint.port < 1 || endpoint.port > 65535) return NotALocation();
  endpoint.host = std::string(host);
  return endpoint;
}

}  // namespace

std::string EndpointText(const RedisEndpoint& endpoint) { return absl::StrCat(endpoint.host, ":", endpoint.port); }

absl::StatusOr<RedisLocation> ParseRedisLocation(absl::string_view url) {
  absl::string_view rest = url;
  RedisLocation location;
  location.cluster = absl::ConsumePrefix(&rest, "redis-cluster://");
  if (!location.cluster && !absl::ConsumePrefix(&rest, "redis://")) return NotALocation();
  absl::ConsumeSuffix(&rest, "/");
  const size_t at = rest.rfind('@');
  if (at != absl::string_view::npos) {
    const absl::string_view login = rest.substr(0, at);
    const size_t colon = login.find(':');
    if (colon == absl::string_view::npos) return NotALocation();
    ASSIGN_OR_RETURN(location.login.user, PercentDecode(login.substr(0, colon)));
    ASSIGN_OR_RETURN(location.login.password, PercentDecode(login.substr(colon + 1)));
    rest.remove_prefix(at + 1);
  }
  for (const absl::string_view text : absl::StrSplit(rest, ',')) {
    ASSIGN_OR_RETURN(RedisEndpoint endpoint, ParseEndpoint(text));
    location.endpoints.push_back(std::move(endpoint));
  }
  if (!location.cluster && location.endpoints.size() > 1) return NotALocation();
  return location;
}

}  // namespace orrery
