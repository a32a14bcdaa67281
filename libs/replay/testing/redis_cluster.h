// A real Redis Cluster for tests: several redis-servers on free ports of the loopback interface.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/replay/testing/redis_server.h"

namespace orrery {

struct RedisClusterOptions {
  int primaries = 3;  // the slots are divided evenly among them; at least 3, or none can be voted out
  int replicas = 0;   // node `primaries + i` follows node i
  std::string password;
  absl::Duration node_timeout = absl::Seconds(5);  // after which a primary that is silent is given up
};

// Not thread-safe, but for Ask(). All servers end with this object.
class RedisCluster {
 public:
  // Starts the servers in folders below `folder` and waits until they are one cluster. NOT_FOUND: redis-server is not installed.
  static absl::StatusOr<std::unique_ptr<RedisCluster>> Start(const std::string& folder, const RedisClusterOptions& options = {});

  int size() const { return static_cast<int>(servers_.size()); }
  RedisServer& node(int i) { return *servers_[i]; }
  // "redis-cluster://[:password@]…" with the first two nodes only: a client finds the others.
  std::string url() const;
  // See RedisServer::Ask.
  std::string Ask(int i, const std::vector<std::string>& words) const;

  // The node that says that it has the slot; -1: none does.
  int Owner(int slot) const;
  // The three steps of moving a slot, as redis-cli does them: from the first on, clients are sent to `to` for keys that are not
  // at `from`; the last one needs all keys to be there. Each returns the first answer of a node that is not "OK", or "".
  std::string BeginMove(int slot, int from, int to) const;
  std::string MoveKeys(int slot, int from, int to, int at_most) const;  // "NOKEY" when there are none left
  std::string EndMove(int slot, int from, int to) const;

  // Waits until the node's slots are all served and it knows all other nodes. DEADLINE_EXCEEDED with what it says instead.
  absl::Status AwaitReady(int i) const;
  // Waits until a replica has everything that its primary has.
  absl::Status AwaitReplication(int primary, int replica) const;

 private:
  explicit RedisCluster(RedisClusterOptions options) : options_(std::move(options)) {}
  absl::Status Launch(const std::string& folder);
  absl::Status Join();
  // Asks until the answer holds all of `parts`.
  absl::Status AwaitAnswer(int i, const std::vector<std::string>& words, const std::vector<std::string>& parts) const;

  const RedisClusterOptions options_;
  std::vector<std::unique_ptr<RedisServer>> servers_;
  std::vector<int> bus_ports_;
  std::vector<std::string> ids_;
};

}  // namespace orrery
