#include "libs/replay/testing/redis_server.h"

#include <hiredis.h>

#include <cstdlib>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr char kNoAnswer[] = "no answer";
constexpr absl::Duration kStartLimit = absl::Seconds(20);
constexpr int kPortAttempts = 5;

std::string Program() {
  const char* const program = std::getenv("ORRERY_REDIS_SERVER");
  return program != nullptr && *program != '\0' ? program : "redis-server";
}

std::string Text(const redisReply& r) {
  if (r.type == REDIS_REPLY_INTEGER) return absl::StrCat(r.integer);
  if (r.type == REDIS_REPLY_NIL) return "-";
  if (r.type != REDIS_REPLY_ARRAY) return std::string(r.str, r.len);
  std::string text = "[";
  for (size_t i = 0; i < r.elements; ++i) absl::StrAppend(&text, i > 0 ? ", " : "", Text(*r.element[i]));
  return text + "]";
}

std::string AskOn(redisContext* context, const std::vector<std::string>& words) {
  std::vector<const char*> argv;
  std::vector<size_t> sizes;
  for (const std::string& word : words) {
    argv.push_back(word.data());
    sizes.push_back(word.size());
  }
  const std::unique_ptr<void, void (*)(void*)> reply(
      redisCommandArgv(context, static_cast<int>(argv.size()), argv.data(), sizes.data()), freeReplyObject);
  return reply == nullptr ? kNoAnswer : Text(*static_cast<const redisReply*>(reply.get()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<RedisServer>> RedisServer::Start(const std::string& folder, std::vector<std::string> arguments) {
  absl::Status status;
  for (int attempt = 0; attempt < kPortAttempts; ++attempt) {
    // Someone else may take the port before redis-server does: then with another one.
    ASSIGN_OR_RETURN(const int port, FreePort());
    std::unique_ptr<RedisServer> server(new RedisServer(folder, arguments, port));
    status = server->Launch();
    if (status.ok()) return server;
    if (!absl::IsUnavailable(status)) return status;
  }
  return status;
}

std::string RedisServer::url() const { return absl::StrCat("redis://127.0.0.1:", port_); }

absl::Status RedisServer::Restart() { return Launch(); }

void RedisServer::Kill() { process_.reset(); }

std::string RedisServer::Ask(const std::vector<std::string>& words, const std::string& password) const {
  const std::unique_ptr<redisContext, void (*)(redisContext*)> context(
      redisConnectWithTimeout("127.0.0.1", port_, absl::ToTimeval(absl::Seconds(10))), redisFree);
  if (context == nullptr || context->err != 0) return kNoAnswer;
  redisSetTimeout(context.get(), absl::ToTimeval(absl::Seconds(30)));
  if (!password.empty()) AskOn(context.get(), {"AUTH", password});
  return AskOn(context.get(), words);
}

absl::Status RedisServer::Launch() {
  std::vector<std::string> words = {Program(), "--port", absl::StrCat(port_), "--bind", "127.0.0.1", "--dir", folder_,
                                    "--appendonly", "yes", "--appendfsync", "always", "--save", "", "--daemonize", "no"};
  words.insert(words.end(), arguments_.begin(), arguments_.end());
  const std::string log = folder_ + "/redis.log";
  ASSIGN_OR_RETURN(process_, ChildProcess::Start(std::move(words), log));
  const absl::Time deadline = absl::Now() + kStartLimit;
  while (absl::Now() < deadline) {
    if (absl::Status status; process_->Ended(status)) {
      return status.ok() ? absl::UnavailableError(absl::StrCat("redis-server ended at once; see ", log)) : status;
    }
    // With a password, that it asks for one is an answer too.
    const std::string answer = Ask({"PING"});
    if (answer == "PONG" || absl::StartsWith(answer, "NOAUTH")) return absl::OkStatus();
    absl::SleepFor(absl::Milliseconds(10));  // another process: there is nothing to wait on
  }
  Kill();
  return absl::DeadlineExceededError(absl::StrCat("redis-server does not answer on port ", port_, "; see ", log));
}

}  // namespace orrery
