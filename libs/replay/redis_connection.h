// Connections to one Redis: commands, replies and errors. hiredis stops in redis_connection.cc.
#pragma once

#include <cstdint>
#include <deque>
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

// Thread-safe: at most `limit` connections to one endpoint, kept while they are not used, as one serves one thread at a time.
class RedisPool {
 public:
  // A connection, and its place among those of the pool. Without GiveBack the connection is closed. Not thread-safe; ends
  // before the pool does.
  class Loan {
   public:
    Loan(RedisPool* pool, std::unique_ptr<RedisConnection> connection, bool was_idle)
        : pool_(pool), connection_(std::move(connection)), was_idle_(was_idle) {}
    ~Loan() {
      connection_.reset();
      if (pool_ != nullptr) pool_->Return(nullptr);
    }
    Loan(Loan&& other) noexcept
        : pool_(std::exchange(other.pool_, nullptr)), connection_(std::move(other.connection_)), was_idle_(other.was_idle_) {}
    Loan& operator=(Loan&&) = delete;

    RedisConnection* operator->() const { return connection_.get(); }
    RedisConnection& operator*() const { return *connection_; }
    // It may turn out to be dead.
    bool was_idle() const { return was_idle_; }
    // For a connection that works: the next one may use it.
    void GiveBack() { std::exchange(pool_, nullptr)->Return(std::move(connection_)); }

   private:
    RedisPool* pool_;
    std::unique_ptr<RedisConnection> connection_;
    bool was_idle_;
  };

  RedisPool(RedisEndpoint endpoint, RedisLogin login, int limit)
      : endpoint_(std::move(endpoint)), login_(std::move(login)), limit_(static_cast<size_t>(limit)) {}

  // An idle connection or a new one. When all are lent, those who wait get one in the order of their coming. UNAVAILABLE: none
  // came back until `deadline`; other errors as RedisConnection::Open.
  absl::StatusOr<Loan> Take(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  // One for somebody who keeps it for long, beside the limit.
  absl::StatusOr<std::unique_ptr<RedisConnection>> Open(absl::Time deadline) const {
    return RedisConnection::Open(endpoint_, login_, deadline);
  }
  // Closes the idle connections: if one is dead (Redis was restarted), so are the others.
  void Clear() ABSL_LOCKS_EXCLUDED(mu_);
  const RedisEndpoint& endpoint() const { return endpoint_; }
  // Calls of Take that wait now, for tests.
  size_t waiting() const ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    return waiting_.size();
  }

 private:
  struct Waiter {
    absl::CondVar turn;
    bool served = false;
  };
  // False: not before `deadline`.
  bool AwaitPlace(absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A place is free again; with the connection that works, or null.
  void Return(std::unique_ptr<RedisConnection> connection) ABSL_LOCKS_EXCLUDED(mu_);

  const RedisEndpoint endpoint_;
  const RedisLogin login_;
  const size_t limit_;
  mutable absl::Mutex mu_;
  // Connections are lent or idle. A place that is taken without one opens one only when none is idle, so lent and idle ones
  // together are at most limit_.
  std::vector<std::unique_ptr<RedisConnection>> idle_ ABSL_GUARDED_BY(mu_);
  size_t taken_ ABSL_GUARDED_BY(mu_) = 0;  // places
  std::deque<Waiter*> waiting_ ABSL_GUARDED_BY(mu_);
};

}  // namespace orrery
