// Where a Redis or a Redis Cluster is, and as whom to log in there.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace orrery {

struct RedisEndpoint {
  std::string host;
  int port = 0;
  auto operator<=>(const RedisEndpoint&) const = default;
};

// "HOST:PORT", with brackets where the host holds colons.
std::string EndpointText(const RedisEndpoint& endpoint);

struct RedisLogin {
  std::string user;      // empty: Redis's default user
  std::string password;  // empty: no AUTH
};

// The parts of a location of Redis as they are written: "SCHEME[USER[:PASSWORD]@]ENDPOINTS", percent-encoded.
struct RedisLocationText {
  absl::string_view scheme;  // "redis://" or "redis-cluster://"
  std::optional<absl::string_view> user, password;
  absl::string_view endpoints;
};

// nullopt: it begins with no scheme of Redis. No part is checked.
std::optional<RedisLocationText> SplitRedisLocation(absl::string_view location);

struct RedisLocation {
  bool cluster = false;
  std::vector<RedisEndpoint> endpoints;  // never empty; one unless it is a cluster, of which it is enough to know some nodes
  RedisLogin login;                      // the same at every node
};

// "redis://[user:password@]HOST:PORT" or "redis-cluster://[user:password@]HOST:PORT[,HOST:PORT…]"; user and password may be
// percent-encoded. INVALID_ARGUMENT does not show the password.
absl::StatusOr<RedisLocation> ParseRedisLocation(absl::string_view url);

}  // namespace orrery
