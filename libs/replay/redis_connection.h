// Connections to one Redis: commands, replies and errors. hiredis stops in redis_connection.cc.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "libs/replay/redis_location.h"

struct redisContext;

namespace orrery {

struct RedisReply {
  enum class Kind { kNil, kInteger, kString, kError, kArray };
  Kind kind = Kind::kNil;
  int64_t integer = 0;
  std::string text;  // of a string, a status or an error
  std::vector<RedisReply> elements;
};

using RedisCommand = std::vector<std::string>;

// The error reply of a Redis as a status that names it: UNAVAILABLE (still loading, not the master, …),
// RESOURCE_EXHAUSTED (its memory is full), PERMISSION_DENIED (no password, or the user may not), FAILED_PRECONDITION (else).
absl::Status RedisErrorStatus(const RedisEndpoint& endpoint, absl::string_view error);

// For one thread at a time. UNAVAILABLE names the endpoint; after it the connection is of no more use.
class RedisConnection {
 public:
  // Connects and logs in. PERMISSION_DENIED: user or password are wrong; the message does not show the password.
  static absl::StatusOr<std::unique_ptr<RedisConnection>> Open(const RedisEndpoint& endpoint, const RedisLogin& login,
                                                               absl::Time deadline);
  ~RedisConnection();

  // Sends all commands at once and waits for their replies: in order, error replies among them.
  absl::StatusOr<std::vector<RedisReply>> Run(absl::Span<const RedisCommand* const> commands, absl::Time deadline);

  // The two halves of Run, for one command: its reply is the next that Receive gives. Between them fd() becomes readable
  // once Redis has something to say.
  absl::Status Send(const RedisCommand& command, absl::Time deadline);
  absl::StatusOr<RedisReply> Receive(absl::Time deadline);
  int fd() const;

  // Whether the failure was that no answer came in time.
  bool timed_out() const { return timed_out_; }

 private:
  RedisConnection(const RedisEndpoint& endpoint, redisContext* context);
  void Add(const RedisCommand& command);
  absl::StatusOr<RedisReply> Next();
  absl::Status SetDeadline(absl::Time deadline);
  absl::Status Broken(absl::string_view what) const;

  const RedisEndpoint endpoint_;
  const std::unique_ptr<redisContext, void (*)(redisContext*)> context_;
  absl::Duration timeout_ = absl::ZeroDuration();
  bool timed_out_ = false;
};

// Thread-safe: keeps connections to one endpoint, as one serves one thread at a time.
class RedisPool {
 public:
  RedisPool(RedisEndpoint endpoint, RedisLogin login) : endpoint_(std::move(endpoint)), login_(std::move(login)) {}

  // An idle connection (`was_idle`: it may turn out to be dead) or a new one; errors as RedisConnection::Open.
  absl::StatusOr<std::unique_ptr<RedisConnection>> Take(absl::Time deadline, bool& was_idle) ABSL_LOCKS_EXCLUDED(mu_);
  void GiveBack(std::unique_ptr<RedisConnection> connection) ABSL_LOCKS_EXCLUDED(mu_);
  // Closes the idle connections: if one is dead (Redis was restarted), so are the others.
  void Clear() ABSL_LOCKS_EXCLUDED(mu_);
  const RedisEndpoint& endpoint() const { return endpoint_; }

 private:
  const RedisEndpoint endpoint_;
  const RedisLogin login_;
  absl::Mutex mu_;
  std::vector<std::unique_ptr<RedisConnection>> idle_ ABSL_GUARDED_BY(mu_);
};

}  // namespace orrery
