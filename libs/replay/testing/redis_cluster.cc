#include "libs/replay/testing/redis_cluster.h"

#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr int kSlots = 16384;
constexpr int kStartAttempts = 3;
constexpr absl::Duration kLimit = absl::Seconds(30);

// "a-b" or "a".
bool Contains(absl::string_view range, int slot) {
  const std::pair<absl::string_view, absl::string_view> ends = absl::StrSplit(range, absl::MaxSplits('-', 1));
  int first = 0, last = 0;
  if (!absl::SimpleAtoi(ends.first, &first)) return false;
  if (!absl::SimpleAtoi(ends.second, &last)) last = first;
  return first <= slot && slot <= last;
}

std::string FirstNotOk(const std::vector<std::string>& answers) {
  for (const std::string& answer : answers) {
    if (answer != "OK") return answer;
  }
  return "";
}

// How many bytes of the history of changes a node has; -1: it does not say.
int64_t ReplicationOffset(absl::string_view info) {
  constexpr absl::string_view kName = "master_repl_offset:";
  const size_t at = info.find(kName);
  if (at == absl::string_view::npos) return -1;
  const absl::string_view rest = info.substr(at + kName.size());
  int64_t offset = -1;
  return absl::SimpleAtoi(rest.substr(0, rest.find('\r')), &offset) ? offset : -1;
}

}  // namespace

absl::StatusOr<std::unique_ptr<RedisCluster>> RedisCluster::Start(const std::string& folder, const RedisClusterOptions& options) {
  absl::Status status;
  for (int attempt = 0; attempt < kStartAttempts; ++attempt) {
    // Someone else may take a port before redis-server does: then with others.
    std::unique_ptr<RedisCluster> cluster(new RedisCluster(options));
    status = cluster->Launch(absl::StrCat(folder, "/", attempt));
    if (status.ok()) status = cluster->Join();
    if (status.ok()) return cluster;
    if (!absl::IsUnavailable(status)) return status;
  }
  return status;
}

absl::Status RedisCluster::Launch(const std::string& folder) {
  for (int i = 0; i < options_.primaries + options_.replicas; ++i) {
    const std::string own = absl::StrCat(folder, "/node-", i);
    RETURN_IF_ERROR(MakeDirectory(own));
    ASSIGN_OR_RETURN(const int bus_port, FreePort());
    std::vector<std::string> arguments = {"--cluster-enabled", "yes",
                                          "--cluster-config-file", "nodes.conf",
                                          "--cluster-port", absl::StrCat(bus_port),
                                          "--cluster-node-timeout", absl::StrCat(absl::ToInt64Milliseconds(options_.node_timeout)),
                                          "--cluster-replica-validity-factor", "0",
                                          "--repl-diskless-sync-delay", "0"};
    if (!options_.password.empty()) {
      arguments.insert(arguments.end(), {"--requirepass", options_.password, "--masterauth", options_.password});
    }
    ASSIGN_OR_RETURN(auto server, RedisServer::Start(own, std::move(arguments)));
    servers_.push_back(std::move(server));
    bus_ports_.push_back(bus_port);
    ids_.push_back(Ask(i, {"CLUSTER", "MYID"}));
  }
  return absl::OkStatus();
}

absl::Status RedisCluster::Join() {
  std::vector<std::string> answers;
  for (int i = 0; i < options_.primaries; ++i) {
    std::vector<std::string> add = {"CLUSTER", "ADDSLOTS"};
    for (int slot = kSlots * i / options_.primaries; slot < kSlots * (i + 1) / options_.primaries; ++slot) {
      add.push_back(absl::StrCat(slot));
    }
    answers.push_back(Ask(i, add));
    answers.push_back(Ask(i, {"CLUSTER", "SET-CONFIG-EPOCH", absl::StrCat(i + 1)}));
  }
  for (int i = 0; i < size(); ++i) {
    for (int j = 0; j < i; ++j) {
      answers.push_back(
          Ask(i, {"CLUSTER", "MEET", "127.0.0.1", absl::StrCat(servers_[j]->port()), absl::StrCat(bus_ports_[j])}));
    }
  }
  if (const std::string wrong = FirstNotOk(answers); !wrong.empty()) {
    return absl::FailedPreconditionError(absl::StrCat("a node of the cluster answers: ", wrong));
  }
  for (int i = 0; i < size(); ++i) RETURN_IF_ERROR(AwaitReady(i));
  for (int i = options_.primaries; i < size(); ++i) {
    RETURN_IF_ERROR(AwaitAnswer(i, {"CLUSTER", "REPLICATE", ids_[i - options_.primaries]}, {"OK"}));
    RETURN_IF_ERROR(AwaitReplication(i - options_.primaries, i));
  }
  return absl::OkStatus();
}

std::string RedisCluster::url() const {
  const std::string login = options_.password.empty() ? "" : absl::StrCat(":", options_.password, "@");
  return absl::StrCat("redis-cluster://", login, "127.0.0.1:", servers_[0]->port(), ",127.0.0.1:", servers_[1]->port());
}

std::string RedisCluster::Ask(int i, const std::vector<std::string>& words) const {
  return servers_[i]->Ask(words, options_.password);
}

int RedisCluster::Owner(int slot) const {
  for (int i = 0; i < size(); ++i) {
    const std::string nodes = Ask(i, {"CLUSTER", "NODES"});
    for (const absl::string_view line : absl::StrSplit(nodes, '\n')) {
      // id, address, flags, primary, two times, epoch, link, slots
      const std::vector<absl::string_view> words = absl::StrSplit(line, ' ');
      if (words.size() < 9 || !absl::StrContains(words[2], "myself") || !absl::StrContains(words[2], "master")) continue;
      for (size_t w = 8; w < words.size(); ++w) {
        if (Contains(words[w], slot)) return i;
      }
    }
  }
  return -1;
}

std::string RedisCluster::BeginMove(int slot, int from, int to) const {
  return FirstNotOk({Ask(to, {"CLUSTER", "SETSLOT", absl::StrCat(slot), "IMPORTING", ids_[from]}),
                     Ask(from, {"CLUSTER", "SETSLOT", absl::StrCat(slot), "MIGRATING", ids_[to]})});
}

std::string RedisCluster::MoveKeys(int slot, int from, int to, int at_most) const {
  const std::string answer = Ask(from, {"CLUSTER", "GETKEYSINSLOT", absl::StrCat(slot), absl::StrCat(at_most)});
  absl::string_view keys = answer;
  if (!absl::ConsumePrefix(&keys, "[") || !absl::ConsumeSuffix(&keys, "]")) return answer;
  if (keys.empty()) return "NOKEY";
  std::vector<std::string> words = {"MIGRATE", "127.0.0.1", absl::StrCat(servers_[to]->port()), "", "0", "10000"};
  if (!options_.password.empty()) words.insert(words.end(), {"AUTH", options_.password});
  words.push_back("KEYS");
  for (const absl::string_view key : absl::StrSplit(keys, ", ")) words.emplace_back(key);
  return FirstNotOk({Ask(from, words)});
}

std::string RedisCluster::EndMove(int slot, int from, int to) const {
  std::vector<std::string> answers;
  for (const int i : {to, from}) answers.push_back(Ask(i, {"CLUSTER", "SETSLOT", absl::StrCat(slot), "NODE", ids_[to]}));
  return FirstNotOk(answers);
}

absl::Status RedisCluster::AwaitAnswer(int i, const std::vector<std::string>& words, const std::vector<std::string>& parts) const {
  const absl::Time deadline = absl::Now() + kLimit;
  while (true) {
    const std::string answer = Ask(i, words);
    bool all = true;
    for (const std::string& part : parts) all = all && absl::StrContains(answer, part);
    if (all) return absl::OkStatus();
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat("node ", i, " of the cluster answers ", words[0], " with ", answer));
    }
    absl::SleepFor(absl::Milliseconds(20));  // another process: there is nothing to wait on
  }
}

absl::Status RedisCluster::AwaitReady(int i) const {
  return AwaitAnswer(i, {"CLUSTER", "INFO"},
                     {"cluster_state:ok", "cluster_slots_ok:16384", absl::StrCat("cluster_known_nodes:", size(), "\r")});
}

absl::Status RedisCluster::AwaitReplication(int primary, int replica) const {
  RETURN_IF_ERROR(AwaitAnswer(replica, {"INFO", "replication"}, {"role:slave", "master_link_status:up"}));
  const int64_t goal = ReplicationOffset(Ask(primary, {"INFO", "replication"}));
  const absl::Time deadline = absl::Now() + kLimit;
  while (ReplicationOffset(Ask(replica, {"INFO", "replication"})) < goal) {
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat("node ", replica, " of the cluster does not reach offset ", goal));
    }
    absl::SleepFor(absl::Milliseconds(20));  // another process: there is nothing to wait on
  }
  return absl::OkStatus();
}

}  // namespace orrery
