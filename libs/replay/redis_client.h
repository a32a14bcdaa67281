// A small Redis client over hiredis, for the Redis store: connections, replies and errors. hiredis stops in redis_client.cc.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace orrery {

struct RedisAddress {
  std::string host;
  int port = 0;
  std::string user;      // empty: Redis's default user
  std::string password;  // empty: no AUTH
};

// "redis://[user:password@]HOST:PORT"; user and password may be percent-encoded. The error does not show the password.
absl::StatusOr<RedisAddress> ParseRedisUrl(absl::string_view url);

struct RedisReply {
  enum class Kind { kNil, kInteger, kString, kError, kArray };
  Kind kind = Kind::kNil;
  int64_t integer = 0;
  std::string text;  // of a string, a status or an error
  std::vector<RedisReply> elements;
};

using RedisCommand = std::vector<std::string>;

class RedisConnection;

// Thread-safe: keeps a pool of connections, as one serves one thread at a time. A connection that fails is closed, and
// opened again at the next call. Errors name host and port: UNAVAILABLE (no connection, no answer in time, still loading,
// not the master, …), RESOURCE_EXHAUSTED (its memory is full), PERMISSION_DENIED (password), FAILED_PRECONDITION (else).
class RedisClient {
 public:
  RedisClient(RedisAddress address, absl::Duration timeout);
  ~RedisClient();

  // Loads a script into Redis and returns its SHA-1, by which Script() calls it.
  absl::StatusOr<std::string> LoadScript(const std::string& source);
  // The command that runs a loaded script; Run() sends the source again if Redis has forgotten it.
  static RedisCommand Script(const std::string& sha, absl::Span<const std::string> keys, std::vector<std::string> arguments);

  // Sends all commands at once and waits for their replies, `wait` longer than the client's timeout. An error reply to any of
  // them is an error. `repeatable`: the commands may be sent twice when a connection that was idle turns out to be dead.
  absl::StatusOr<std::vector<RedisReply>> Run(const std::vector<RedisCommand>& commands, bool repeatable = true,
                                              absl::Duration wait = absl::ZeroDuration());
  absl::StatusOr<RedisReply> RunOne(RedisCommand command, bool repeatable = true, absl::Duration wait = absl::ZeroDuration());

 private:
  absl::StatusOr<std::unique_ptr<RedisConnection>> Take(bool& was_idle) ABSL_LOCKS_EXCLUDED(mu_);
  void GiveBack(std::unique_ptr<RedisConnection> connection) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status RunForgottenScripts(RedisConnection& connection, const std::vector<RedisCommand>& commands,
                                   std::vector<RedisReply>& replies, absl::Duration timeout);
  absl::Status ErrorStatus(absl::string_view error) const;

  const RedisAddress address_;
  const absl::Duration timeout_;
  absl::Mutex mu_;
  std::vector<std::unique_ptr<RedisConnection>> idle_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, std::string> scripts_ ABSL_GUARDED_BY(mu_);  // by SHA-1
};

}  // namespace orrery
