#include "libs/replay/redis_connection.h"

#include <hiredis.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

// hiredis writes with write(), which raises SIGPIPE when Redis has gone away.
void IgnoreSigpipe() {
  struct sigaction action {};
  if (sigaction(SIGPIPE, nullptr, &action) == 0 && action.sa_handler == SIG_DFL) signal(SIGPIPE, SIG_IGN);
}

RedisReply Convert(const redisReply& r) {
  RedisReply reply;
  switch (r.type) {
    case REDIS_REPLY_INTEGER:
      reply.kind = RedisReply::Kind::kInteger;
      reply.integer = r.integer;
      break;
    case REDIS_REPLY_STRING:
    case REDIS_REPLY_STATUS:
    case REDIS_REPLY_ERROR:
      reply.kind = r.type == REDIS_REPLY_ERROR ? RedisReply::Kind::kError : RedisReply::Kind::kString;
      reply.text.assign(r.str, r.len);
      break;
    case REDIS_REPLY_ARRAY:
      reply.kind = RedisReply::Kind::kArray;
      for (size_t i = 0; i < r.elements; ++i) reply.elements.push_back(Convert(*r.element[i]));
      break;
    default:
      break;
  }
  return reply;
}

std::string Name(const RedisEndpoint& endpoint) { return absl::StrCat("Redis at ", EndpointText(endpoint)); }

// What is left until `deadline` in whole milliseconds, at least one: a timeout that mostly stays the same need not be set anew.
absl::Duration Left(absl::Time deadline) {
  return std::max(absl::Ceil(deadline - absl::Now(), absl::Milliseconds(1)), absl::Milliseconds(1));
}

// An answer to AUTH. Its words are not passed on, as a Redis that does not know the command quotes the password.
absl::Status LoginStatus(const RedisEndpoint& endpoint, const RedisLogin& login, absl::string_view error) {
  const absl::Status status = RedisErrorStatus(endpoint, error);
  if (absl::IsUnavailable(status)) return status;
  const std::string user = login.user.empty() ? "the default user" : absl::StrCat("user '", login.user, "'");
  if (absl::StrContains(error, "without any password configured")) {
    return absl::PermissionDeniedError(absl::StrCat(Name(endpoint), " has no password for ", user, ", but the location has one"));
  }
  return absl::PermissionDeniedError(absl::StrCat(Name(endpoint), " refuses the password of ", user));
}

}  // namespace

absl::Status RedisErrorStatus(const RedisEndpoint& endpoint, absl::string_view error) {
  const std::string message = absl::StrCat(Name(endpoint), ": ", error);
  // In Redis 6 an error inside a script comes with other words before it.
  if (absl::StartsWith(error, "OOM ") || absl::StrContains(error, "-OOM ")) return absl::ResourceExhaustedError(message);
  for (const char* word : {"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "UNBLOCKED", "BUSY ", "MISCONF",
                           "NOREPLICAS", "ERR max number of clients"}) {
    if (absl::StartsWith(error, word)) return absl::UnavailableError(message);
  }
  for (const char* word : {"NOAUTH", "WRONGPASS", "NOPERM", "ERR AUTH", "ERR invalid password"}) {
    if (absl::StartsWith(error, word)) return absl::PermissionDeniedError(message);
  }
  if (absl::StartsWith(error, "MOVED ") || absl::StartsWith(error, "ASK ") || absl::StartsWith(error, "CROSSSLOT")) {
    return absl::FailedPreconditionError(absl::StrCat(message, "; it is part of a cluster, expected redis-cluster://HOST:PORT"));
  }
  if (absl::StrContains(error, "cluster support disabled")) {
    return absl::FailedPreconditionError(absl::StrCat(message, "; it is not part of a cluster, expected redis://HOST:PORT"));
  }
  return absl::FailedPreconditionError(message);
}

RedisConnection::RedisConnection(const RedisEndpoint& endpoint, redisContext* context)
    : endpoint_(endpoint), context_(context, redisFree) {}
RedisConnection::~RedisConnection() = default;

absl::StatusOr<std::unique_ptr<RedisConnection>> RedisConnection::Open(const RedisEndpoint& endpoint, const RedisLogin& login,
                                                                       absl::Time deadline) {
  static const bool ignored = (IgnoreSigpipe(), true);
  (void)ignored;
  const timeval timeout = absl::ToTimeval(Left(deadline));
  std::unique_ptr<RedisConnection> connection(
      new RedisConnection(endpoint, redisConnectWithTimeout(endpoint.host.c_str(), endpoint.port, timeout)));
  if (connection->context_ == nullptr) return absl::ResourceExhaustedError(Name(endpoint) + ": no memory for a connection");
  if (connection->context_->err != 0) return connection->Broken("cannot connect");
  redisEnableKeepAlive(connection->context_.get());
  if (login.password.empty()) return connection;
  RedisCommand auth = {"AUTH", login.user, login.password};
  if (login.user.empty()) auth.erase(auth.begin() + 1);
  RETURN_IF_ERROR(connection->Send(auth, deadline));
  ASSIGN_OR_RETURN(const RedisReply reply, connection->Receive(deadline));
  if (reply.kind == RedisReply::Kind::kError) return LoginStatus(endpoint, login, reply.text);
  return connection;
}

int RedisConnection::fd() const { return context_->fd; }

absl::Status RedisConnection::Broken(absl::string_view what) const {
  if (timed_out_) return absl::UnavailableError(absl::StrCat(Name(endpoint_), ": no answer in ", absl::FormatDuration(timeout_)));
  return absl::UnavailableError(absl::StrCat(Name(endpoint_), ": ", what, ": ", context_->errstr));
}

absl::Status RedisConnection::SetDeadline(absl::Time deadline) {
  const absl::Duration timeout = Left(deadline);
  if (timeout == timeout_) return absl::OkStatus();
  if (redisSetTimeout(context_.get(), absl::ToTimeval(timeout)) != REDIS_OK) return Broken("cannot set a timeout");
  timeout_ = timeout;
  return absl::OkStatus();
}

void RedisConnection::Add(const RedisCommand& command) {
  std::vector<const char*> words;
  std::vector<size_t> sizes;
  for (const std::string& word : command) {
    words.push_back(word.data());
    sizes.push_back(word.size());
  }
  redisAppendCommandArgv(context_.get(), static_cast<int>(words.size()), words.data(), sizes.data());
}

absl::StatusOr<RedisReply> RedisConnection::Next() {
  void* raw = nullptr;
  errno = 0;
  if (redisGetReply(context_.get(), &raw) != REDIS_OK || raw == nullptr) {
    timed_out_ = errno == EAGAIN || errno == EWOULDBLOCK;
    return Broken("connection lost");
  }
  RedisReply reply = Convert(*static_cast<redisReply*>(raw));
  freeReplyObject(raw);
  return reply;
}

absl::StatusOr<std::vector<RedisReply>> RedisConnection::Run(absl::Span<const RedisCommand* const> commands,
                                                             absl::Time deadline) {
  RETURN_IF_ERROR(SetDeadline(deadline));
  for (const RedisCommand* command : commands) Add(*command);
  std::vector<RedisReply> replies;
  for (size_t i = 0; i < commands.size(); ++i) {
    ASSIGN_OR_RETURN(RedisReply reply, Next());
    replies.push_back(std::move(reply));
  }
  return replies;
}

absl::Status RedisConnection::Send(const RedisCommand& command, absl::Time deadline) {
  RETURN_IF_ERROR(SetDeadline(deadline));
  Add(command);
  for (int done = 0; done == 0;) {
    if (redisBufferWrite(context_.get(), &done) != REDIS_OK) return Broken("connection lost");
  }
  return absl::OkStatus();
}

absl::StatusOr<RedisReply> RedisConnection::Receive(absl::Time deadline) {
  RETURN_IF_ERROR(SetDeadline(deadline));
  return Next();
}

bool RedisPool::AwaitPlace(absl::Time deadline) {
  if (taken_ < limit_) {  // then nobody waits
    ++taken_;
    return true;
  }
  Waiter waiter;
  waiting_.push_back(&waiter);
  while (!waiter.served && absl::Now() < deadline) waiter.turn.WaitWithDeadline(&mu_, deadline);
  if (!waiter.served) waiting_.erase(std::find(waiting_.begin(), waiting_.end(), &waiter));
  return waiter.served;
}

absl::StatusOr<RedisPool::Loan> RedisPool::Take(absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    if (!AwaitPlace(deadline)) {
      return absl::UnavailableError(
          absl::StrCat(Name(endpoint_), ": all ", limit_, " connections are in use, and none became free in time"));
    }
    if (!idle_.empty()) {
      std::unique_ptr<RedisConnection> connection = std::move(idle_.back());
      idle_.pop_back();
      return Loan(this, std::move(connection), /*was_idle=*/true);
    }
  }
  absl::StatusOr<std::unique_ptr<RedisConnection>> connection = Open(deadline);
  if (connection.ok()) return Loan(this, *std::move(connection), /*was_idle=*/false);
  Return(nullptr);
  return connection.status();
}

void RedisPool::Return(std::unique_ptr<RedisConnection> connection) {
  absl::MutexLock lock(&mu_);
  if (connection != nullptr) idle_.push_back(std::move(connection));
  if (waiting_.empty()) {
    --taken_;
    return;
  }
  waiting_.front()->served = true;
  waiting_.front()->turn.Signal();
  waiting_.pop_front();
}

void RedisPool::Clear() {
  std::vector<std::unique_ptr<RedisConnection>> closed;
  absl::MutexLock lock(&mu_);
  closed.swap(idle_);
}

}  // namespace orrery
