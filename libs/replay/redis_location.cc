#include "libs/replay/redis_location.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "libs/base/host_port.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr absl::string_view kScheme = "redis://";
constexpr absl::string_view kClusterScheme = "redis-cluster://";

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
  std::optional<HostPort> parsed = ParseHostPort(text);
  if (!parsed.has_value() || parsed->host.empty() || parsed->port == 0) return NotALocation();
  return RedisEndpoint{std::move(parsed->host), parsed->port};
}

}  // namespace

std::string EndpointText(const RedisEndpoint& endpoint) { return HostPort{endpoint.host, endpoint.port}.text(); }

std::optional<RedisLocationText> SplitRedisLocation(absl::string_view location) {
  for (const absl::string_view scheme : {kScheme, kClusterScheme}) {
    if (!absl::StartsWith(location, scheme)) continue;
    RedisLocationText text{.scheme = scheme, .endpoints = location.substr(scheme.size())};
    const size_t at = text.endpoints.rfind('@');
    if (at == absl::string_view::npos) return text;
    const absl::string_view login = text.endpoints.substr(0, at);
    const size_t colon = login.find(':');
    text.user = login.substr(0, colon);
    if (colon != absl::string_view::npos) text.password = login.substr(colon + 1);
    text.endpoints.remove_prefix(at + 1);
    return text;
  }
  return std::nullopt;
}

absl::StatusOr<RedisLocation> ParseRedisLocation(absl::string_view url) {
  std::optional<RedisLocationText> text = SplitRedisLocation(url);
  if (!text.has_value() || text->user.has_value() != text->password.has_value()) return NotALocation();
  RedisLocation location;
  location.cluster = text->scheme == kClusterScheme;
  ASSIGN_OR_RETURN(location.login.user, PercentDecode(text->user.value_or("")));
  ASSIGN_OR_RETURN(location.login.password, PercentDecode(text->password.value_or("")));
  absl::ConsumeSuffix(&text->endpoints, "/");
  for (const absl::string_view endpoint_text : absl::StrSplit(text->endpoints, ',')) {
    ASSIGN_OR_RETURN(RedisEndpoint endpoint, ParseEndpoint(endpoint_text));
    location.endpoints.push_back(std::move(endpoint));
  }
  if (!location.cluster && location.endpoints.size() > 1) return NotALocation();
  return location;
}

}  // namespace orrery
