#include "libs/replay/redis_client.h"

#include <poll.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/replay/redis_slots.h"

namespace orrery {
namespace {

constexpr absl::Duration kShortPause = absl::Milliseconds(5);
constexpr absl::Duration kLongPause = absl::Milliseconds(100);
constexpr char kScanBatch[] = "1000";

// The key that decides which node gets a command. One without a key may go to any node.
absl::string_view KeyOf(const RedisCommand& command) {
  const size_t at = absl::StartsWith(command[0], "EVAL") ? 3 : 1;
  return command.size() > at ? absl::string_view(command[at]) : absl::string_view();
}

}  // namespace

struct RedisClient::Call {
  const std::vector<RedisCommand>& commands;
  const bool repeatable;
  const absl::Time deadline;
  std::vector<RedisReply> replies;
  std::vector<size_t> open;  // commands that have no reply yet
  absl::Status problem;      // why

  void Postpone(size_t index, absl::Status status) {
    open.push_back(index);
    problem = std::move(status);
  }
};

RedisClient::RedisClient(RedisLocation location, absl::Duration timeout, int max_connections)
    : timeout_(timeout), nodes_(std::move(location), max_connections) {}
RedisClient::~RedisClient() = default;

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

absl::StatusOr<std::vector<RedisReply>> RedisClient::Run(const std::vector<RedisCommand>& commands, bool repeatable) {
  Call call{commands, repeatable, absl::Now() + timeout_, std::vector<RedisReply>(commands.size()), {}, {}};
  call.open.resize(commands.size());
  std::iota(call.open.begin(), call.open.end(), size_t{0});
  for (absl::Duration pause;; pause = std::clamp(pause * 2, kShortPause, kLongPause)) {
    RETURN_IF_ERROR(Try(call));
    if (call.open.empty()) return std::move(call.replies);
    // A go without time to be answered would only hide why the others failed.
    if (!nodes_.cluster() || absl::Now() + pause >= call.deadline - timeout_ / 10) return call.problem;
    absl::SleepFor(pause);
  }
}

absl::StatusOr<RedisReply> RedisClient::RunOne(RedisCommand command, bool repeatable) {
  ASSIGN_OR_RETURN(std::vector<RedisReply> replies, Run({std::move(command)}, repeatable));
  return std::move(replies[0]);
}

absl::Status RedisClient::Try(Call& call) {
  std::map<std::shared_ptr<RedisPool>, std::vector<size_t>> by_node;
  for (const size_t index : call.open) {
    absl::StatusOr<std::shared_ptr<RedisPool>> owner = nodes_.Owner(KeyOf(call.commands[index]), call.deadline);
    if (!owner.ok()) {
      // What a node said of the command tells more than that it cannot be asked where else to go.
      if (call.problem.ok()) call.problem = owner.status();
      return absl::IsUnavailable(owner.status()) ? absl::OkStatus() : owner.status();
    }
    by_node[*std::move(owner)].push_back(index);
  }
  call.open.clear();
  for (const auto& [pool, indices] : by_node) RETURN_IF_ERROR(TryAt(*pool, indices, call));
  return absl::OkStatus();
}

absl::Status RedisClient::TryAt(RedisPool& pool, const std::vector<size_t>& indices, Call& call) {
  std::vector<const RedisCommand*> commands;
  for (const size_t index : indices) commands.push_back(&call.commands[index]);
  bool sent = false;
  absl::StatusOr<std::vector<RedisReply>> replies = Exchange(pool, commands, call.repeatable, call.deadline, sent);
  if (!replies.ok()) {
    nodes_.Forget();
    if ((sent && !call.repeatable) || !absl::IsUnavailable(replies.status())) return replies.status();
    for (const size_t index : indices) call.Postpone(index, replies.status());
    return absl::OkStatus();
  }
  for (size_t i = 0; i < indices.size(); ++i) {
    RETURN_IF_ERROR(Accept(pool.endpoint(), indices[i], std::move((*replies)[i]), /*asked=*/false, call));
  }
  return absl::OkStatus();
}

// While a slot moves, a node answers for keys that have not arrived yet only if it is told that we were sent there.
absl::Status RedisClient::TryElsewhere(RedisPool& pool, size_t index, Call& call) {
  static const RedisCommand kAsking = {"ASKING"};
  bool sent = false;
  absl::StatusOr<std::vector<RedisReply>> replies =
      Exchange(pool, {&kAsking, &call.commands[index]}, call.repeatable, call.deadline, sent);
  if (!replies.ok()) {
    nodes_.Forget();
    if ((sent && !call.repeatable) || !absl::IsUnavailable(replies.status())) return replies.status();
    call.Postpone(index, replies.status());
    return absl::OkStatus();
  }
  return Accept(pool.endpoint(), index, std::move((*replies)[1]), /*asked=*/true, call);
}

absl::Status RedisClient::Accept(const RedisEndpoint& from, size_t index, RedisReply reply, bool asked, Call& call) {
  if (reply.kind != RedisReply::Kind::kError) {
    call.replies[index] = std::move(reply);
    return absl::OkStatus();
  }
  const std::optional<RedisRedirect> redirect =
      nodes_.cluster() ? ParseRedisRedirect(reply.text, from) : std::optional<RedisRedirect>();
  if (redirect.has_value()) {
    if (redirect->ask && !asked) return TryElsewhere(*nodes_.At(redirect->to), index, call);
    nodes_.Forget(redirect->to);
    call.Postpone(index, absl::UnavailableError(absl::StrCat("Redis at ", EndpointText(from), ": ", reply.text)));
    return absl::OkStatus();
  }
  absl::Status status = RedisErrorStatus(from, reply.text);
  if (!absl::IsUnavailable(status)) return status;
  nodes_.Forget();
  call.Postpone(index, std::move(status));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<RedisReply>> RedisClient::Exchange(RedisPool& pool, absl::Span<const RedisCommand* const> commands,
                                                              bool repeatable, absl::Time deadline, bool& sent) {
  for (int attempt = 0;; ++attempt) {
    ASSIGN_OR_RETURN(RedisPool::Loan connection, pool.Take(deadline));
    sent = true;
    absl::StatusOr<std::vector<RedisReply>> replies = connection->Run(commands, deadline);
    if (replies.ok()) {
      RETURN_IF_ERROR(RunUnknownScripts(*connection, commands, *replies, deadline));
      connection.GiveBack();
      return replies;
    }
    pool.Clear();
    if (!connection.was_idle() || !repeatable || connection->timed_out() || attempt > 0) return replies.status();
  }
}

absl::Status RedisClient::RunUnknownScripts(RedisConnection& connection, absl::Span<const RedisCommand* const> commands,
                                            std::vector<RedisReply>& replies, absl::Time deadline) {
  for (size_t i = 0; i < replies.size(); ++i) {
    if (replies[i].kind != RedisReply::Kind::kError || !absl::StartsWith(replies[i].text, "NOSCRIPT")) continue;
    RedisCommand eval = *commands[i];
    {
      absl::MutexLock lock(&mu_);
      eval[0] = "EVAL";
      eval[1] = scripts_[eval[1]];
    }
    std::vector<const RedisCommand*> again = {&eval};
    if (i > 0 && commands[i - 1]->front() == "ASKING") again.insert(again.begin(), commands[i - 1]);
    ASSIGN_OR_RETURN(std::vector<RedisReply> answers, connection.Run(again, deadline));
    replies[i] = std::move(answers.back());
  }
  return absl::OkStatus();
}

absl::Status RedisClient::Scan(const std::string& pattern, const KeyVisitor& visit) {
  ASSIGN_OR_RETURN(const auto primaries, nodes_.Primaries(absl::Now() + timeout_));
  for (const std::shared_ptr<RedisPool>& pool : primaries) {
    std::string cursor = "0";
    do {
      const RedisCommand command = {"SCAN", cursor, "MATCH", pattern, "COUNT", kScanBatch};
      bool sent = false;
      ASSIGN_OR_RETURN(const auto replies, Exchange(*pool, {&command}, /*repeatable=*/true, absl::Now() + timeout_, sent));
      const RedisReply& reply = replies[0];
      if (reply.kind == RedisReply::Kind::kError) return RedisErrorStatus(pool->endpoint(), reply.text);
      if (reply.elements.size() != 2) {
        return absl::DataLossError(absl::StrCat("Redis at ", EndpointText(pool->endpoint()), " answers SCAN with something else"));
      }
      cursor = reply.elements[0].text;
      std::vector<std::string> keys;
      for (const RedisReply& key : reply.elements[1].elements) keys.push_back(key.text);
      if (!keys.empty()) RETURN_IF_ERROR(visit(keys));
    } while (cursor != "0");
  }
  return absl::OkStatus();
}

// Redis waits on streams of one slot at a time, so in a cluster each has a connection of its own. They are kept for the next
// call, still waiting if they were not answered: no change can slip through, and connections are not made again and again.
absl::Status RedisClient::Await(absl::Span<const StreamPosition> streams, absl::Duration wait) {
  const absl::Time deadline = absl::Now() + wait;
  const size_t group = nodes_.cluster() ? 1 : std::max<size_t>(1, streams.size());
  std::vector<std::pair<std::string, Watch>> watches;
  std::vector<pollfd> polled;
  for (size_t i = 0; i < streams.size(); i += group) {
    ASSIGN_OR_RETURN(Watch watch, StartWatch(streams.subspan(i, group), wait));
    polled.push_back({watch.connection->fd(), POLLIN, 0});
    watches.emplace_back(streams[i].key, std::move(watch));
  }
  const absl::Duration limit = std::clamp(absl::Ceil(wait, absl::Milliseconds(1)), absl::Milliseconds(1), absl::Hours(1));
  if (poll(polled.data(), polled.size(), static_cast<int>(absl::ToInt64Milliseconds(limit))) <= 0) {
    for (pollfd& p : polled) p.revents = 0;
  }
  bool pause = false;
  for (size_t i = 0; i < watches.size(); ++i) {
    auto& [key, watch] = watches[i];
    if (polled[i].revents != 0) {
      ASSIGN_OR_RETURN(const bool told, EndWatch(watch));
      pause = pause || !told;
    }
    absl::MutexLock lock(&mu_);
    if (watch.connection != nullptr) watches_.insert_or_assign(key, std::move(watch));
  }
  if (pause) absl::SleepFor(std::min(kLongPause, deadline - absl::Now()));
  return absl::OkStatus();
}

absl::StatusOr<RedisClient::Watch> RedisClient::StartWatch(absl::Span<const StreamPosition> streams, absl::Duration wait) {
  const absl::Time now = absl::Now();
  ASSIGN_OR_RETURN(const std::shared_ptr<RedisPool> pool, nodes_.Owner(streams[0].key, now + timeout_));
  Watch watch;
  {
    absl::MutexLock lock(&mu_);
    const auto kept = watches_.find(streams[0].key);
    if (kept != watches_.end()) {
      watch = std::move(kept->second);
      watches_.erase(kept);
    }
  }
  if (watch.connection != nullptr && watch.pool == pool && now < watch.expires + timeout_) {
    pollfd polled = {watch.connection->fd(), POLLIN, 0};
    const bool readable = poll(&polled, 1, 0) != 0;
    if (watch.waiting && !readable) return watch;
    // Answered since, about entries that the caller has seen by now, or in vain. Where nothing was asked: it was closed.
    if (readable && (!watch.waiting || !watch.connection->Receive(now + timeout_).ok())) watch.connection.reset();
  } else {
    watch.connection.reset();
  }
  if (watch.connection == nullptr) {
    ASSIGN_OR_RETURN(watch.connection, pool->Open(now + timeout_));
  }
  watch.pool = pool;
  watch.waiting = true;
  watch.expires = now + wait;
  const int64_t block = std::max<int64_t>(1, absl::ToInt64Milliseconds(wait));
  RedisCommand command = {"XREAD", "COUNT", "1", "BLOCK", absl::StrCat(block), "STREAMS"};
  for (const StreamPosition& stream : streams) command.push_back(stream.key);
  for (const StreamPosition& stream : streams) command.push_back(stream.id);
  RETURN_IF_ERROR(watch.connection->Send(command, now + timeout_));
  return watch;
}

absl::StatusOr<bool> RedisClient::EndWatch(Watch& watch) {
  const absl::StatusOr<RedisReply> reply = watch.connection->Receive(absl::Now() + timeout_);
  watch.waiting = false;
  if (!reply.ok()) {
    watch.connection.reset();
    watch.pool->Clear();
    nodes_.Forget();
    return false;
  }
  const RedisEndpoint& endpoint = watch.pool->endpoint();
  if (reply->kind != RedisReply::Kind::kError) return true;
  const absl::Status status = RedisErrorStatus(endpoint, reply->text);
  if (!absl::IsUnavailable(status) && !(nodes_.cluster() && ParseRedisRedirect(reply->text, endpoint).has_value())) return status;
  nodes_.Forget();
  return false;
}

}  // namespace orrery
