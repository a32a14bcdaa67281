#include "libs/replay/redis_client.h"

#include <hiredis.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr size_t kMaxIdle = 16;

// hiredis writes with write(), which raises SIGPIPE when Redis has gone away.
void IgnoreSigpipe() {
  struct sigaction action {};
  if (sigaction(SIGPIPE, nullptr, &action) == 0 && action.sa_handler == SIG_DFL) signal(SIGPIPE, SIG_IGN);
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
      return absl::InvalidArgumentError("user or password of a redis:// location: '%' must be followed by two hexadecimal digits");
    }
    out += static_cast<char>(value);
    i += 2;
  }
  return out;
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

timeval Timeout(absl::Duration d) { return absl::ToTimeval(std::max(d, absl::Milliseconds(1))); }

}  // namespace

absl::StatusOr<RedisAddress> ParseRedisUrl(absl::string_view url) {
  absl::string_view rest = url;
  RedisAddress address;
  const auto refuse = [] {
    return absl::InvalidArgumentError("location of Redis: expected redis://[user:password@]HOST:PORT");
  };
  if (!absl::ConsumePrefix(&rest, "redis://")) return refuse();
  absl::ConsumeSuffix(&rest, "/");
  const size_t at = rest.rfind('@');
  if (at != absl::string_view::npos) {
    const absl::string_view login = rest.substr(0, at);
    const size_t colon = login.find(':');
    if (colon == absl::string_view::npos) return refuse();
    ASSIGN_OR_RETURN(address.user, PercentDecode(login.substr(0, colon)));
    ASSIGN_OR_RETURN(address.password, PercentDecode(login.substr(colon + 1)));
    rest.remove_prefix(at + 1);
  }
  const size_t colon = rest.rfind(':');
  if (colon == absl::string_view::npos || !absl::SimpleAtoi(rest.substr(colon + 1), &address.port)) return refuse();
  absl::string_view host = rest.substr(0, colon);
  if (absl::ConsumePrefix(&host, "[") && !absl::ConsumeSuffix(&host, "]")) return refuse();
  if (host.empty() || address.port < 1 || address.port > 65535) return refuse();
  address.host = std::string(host);
  return address;
}

// One connection, for one thread at a time.
class RedisConnection {
 public:
  static absl::StatusOr<std::unique_ptr<RedisConnection>> Open(const RedisAddress& address, absl::Duration timeout) {
    const std::string name = absl::StrCat("Redis at ", address.host, ":", address.port);
    std::unique_ptr<RedisConnection> connection(
        new RedisConnection(name, redisConnectWithTimeout(address.host.c_str(), address.port, Timeout(timeout))));
    if (connection->context_ == nullptr) return absl::ResourceExhaustedError(name + ": no memory for a connection");
    if (connection->context_->err != 0) return connection->Broken("cannot connect");
    redisEnableKeepAlive(connection->context_.get());
    return connection;
  }

  // Replies in order, error replies among them. UNAVAILABLE: the connection is of no more use.
  absl::StatusOr<std::vector<RedisReply>> Run(const std::vector<RedisCommand>& commands, absl::Duration timeout) {
    if (timeout != timeout_) {
      if (redisSetTimeout(context_.get(), Timeout(timeout)) != REDIS_OK) return Broken("cannot set a timeout");
      timeout_ = timeout;
    }
    for (const RedisCommand& command : commands) {
      std::vector<const char*> words;
      std::vector<size_t> sizes;
      for (const std::string& word : command) {
        words.push_back(word.data());
        sizes.push_back(word.size());
      }
      redisAppendCommandArgv(context_.get(), static_cast<int>(words.size()), words.data(), sizes.data());
    }
    std::vector<RedisReply> replies;
    for (size_t i = 0; i < commands.size(); ++i) {
      void* raw = nullptr;
      errno = 0;
      if (redisGetReply(context_.get(), &raw) != REDIS_OK || raw == nullptr) {
        timed_out_ = errno == EAGAIN || errno == EWOULDBLOCK;
        return Broken(timed_out_ ? absl::StrCat("no answer in ", absl::FormatDuration(timeout)) : "connection lost");
      }
      replies.push_back(Convert(*static_cast<redisReply*>(raw)));
      freeReplyObject(raw);
    }
    return replies;
  }

  bool timed_out() const { return timed_out_; }

 private:
  RedisConnection(std::string name, redisContext* context) : name_(std::move(name)), context_(context, redisFree) {}
  absl::Status Broken(absl::string_view what) const {
    return absl::UnavailableError(absl::StrCat(name_, ": ", what, timed_out_ ? "" : ": ", timed_out_ ? "" : context_->errstr));
  }

  const std::string name_;
  const std::unique_ptr<redisContext, void (*)(redisContext*)> context_;
  absl::Duration timeout_ = absl::ZeroDuration();
  bool timed_out_ = false;
};

RedisClient::RedisClient(RedisAddress address, absl::Duration timeout) : address_(std::move(address)), timeout_(timeout) {
  IgnoreSigpipe();
}
RedisClient::~RedisClient() = default;

absl::Status RedisClient::ErrorStatus(absl::string_view error) const {
  const std::string message = absl::StrCat("Redis at ", address_.host, ":", address_.port, ": ", error);
  // In Redis 6 an error inside a script comes with other words before it.
  if (absl::StartsWith(error, "OOM ") || absl::StrContains(error, "-OOM ")) return absl::ResourceExhaustedError(message);
  for (const char* word : {"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY ", "MISCONF", "NOREPLICAS",
                           "ERR max number of clients"}) {
    if (absl::StartsWith(error, word)) return absl::UnavailableError(message);
  }
  for (const char* word : {"NOAUTH", "WRONGPASS", "NOPERM", "ERR AUTH", "ERR invalid password"}) {
    if (absl::StartsWith(error, word)) return absl::PermissionDeniedError(message);
  }
  return absl::FailedPreconditionError(message);
}

absl::StatusOr<std::unique_ptr<RedisConnection>> RedisClient::Take(bool& was_idle) {
  {
    absl::MutexLock lock(&mu_);
    was_idle = !idle_.empty();
    if (was_idle) {
      std::unique_ptr<RedisConnection> connection = std::move(idle_.back());
      idle_.pop_back();
      return connection;
    }
  }
  ASSIGN_OR_RETURN(std::unique_ptr<RedisConnection> connection, RedisConnection::Open(address_, timeout_));
  if (!address_.password.empty()) {
    RedisCommand auth = {"AUTH", address_.user, address_.password};
    if (address_.user.empty()) auth.erase(auth.begin() + 1);
    ASSIGN_OR_RETURN(const std::vector<RedisReply> replies, connection->Run({auth}, timeout_));
    if (replies[0].kind == RedisReply::Kind::kError) return ErrorStatus(replies[0].text);
  }
  return connection;
}

void RedisClient::GiveBack(std::unique_ptr<RedisConnection> connection) {
  absl::MutexLock lock(&mu_);
  if (idle_.size() < kMaxIdle) idle_.push_back(std::move(connection));
}

absl::StatusOr<std::string> RedisClient::LoadScript(const std::string& source) {
  ASSIGN_OR_RETURN(const RedisReply reply, RunOne({"SCRIPT", "LOAD", source}));
  absl::MutexLock lock(&mu_);
  scripts_[reply.text] = source;
  return reply.text;
}

RedisCommand RedisClient::Script(const std::string& sha, absl::Span<const std::string> keys, std::vector<std::string> arguments) {
  RedisCommand command = {"EVALSHA", sha, absl::StrCat(keys.size())};
  command.insert(command.end(), keys.begin(), keys.end());
  for (std::string& argument : arguments) command.push_back(std::move(argument));
  return command;
}

absl::Status RedisClient::RunForgottenScripts(RedisConnection& connection, const std::vector<RedisCommand>& commands,
                                              std::vector<RedisReply>& replies, absl::Duration timeout) {
  for (size_t i = 0; i < replies.size(); ++i) {
    if (replies[i].kind != RedisReply::Kind::kError || !absl::StartsWith(replies[i].text, "NOSCRIPT")) continue;
    RedisCommand eval = commands[i];
    {
      absl::MutexLock lock(&mu_);
      eval[0] = "EVAL";
      eval[1] = scripts_[eval[1]];
    }
    ASSIGN_OR_RETURN(std::vector<RedisReply> again, connection.Run({eval}, timeout));
    replies[i] = std::move(again[0]);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<RedisReply>> RedisClient::Run(const std::vector<RedisCommand>& commands, bool repeatable,
                                                         absl::Duration wait) {
  for (int attempt = 0;; ++attempt) {
    bool was_idle = false;
    ASSIGN_OR_RETURN(std::unique_ptr<RedisConnection> connection, Take(was_idle));
    absl::StatusOr<std::vector<RedisReply>> replies = connection->Run(commands, timeout_ + wait);
    if (replies.ok()) {
      const absl::Status status = RunForgottenScripts(*connection, commands, *replies, timeout_ + wait);
      if (!status.ok()) return status;
      GiveBack(std::move(connection));
      for (const RedisReply& reply : *replies) {
        if (reply.kind == RedisReply::Kind::kError) return ErrorStatus(reply.text);
      }
      return replies;
    }
    {
      // If one idle connection is dead (Redis was restarted), so are the others.
      absl::MutexLock lock(&mu_);
      idle_.clear();
    }
    if (!was_idle || !repeatable || connection->timed_out() || attempt > 0) return replies.status();
  }
}

absl::StatusOr<RedisReply> RedisClient::RunOne(RedisCommand command, bool repeatable, absl::Duration wait) {
  ASSIGN_OR_RETURN(std::vector<RedisReply> replies, Run({std::move(command)}, repeatable, wait));
  return std::move(replies[0]);
}

}  // namespace orrery
