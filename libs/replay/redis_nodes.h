// The nodes of a Redis Cluster, or the one Redis: who has which key.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/replay/redis_connection.h"
#include "libs/replay/redis_location.h"
#include "libs/replay/redis_slots.h"

namespace orrery {

// Thread-safe. Asks any node of a cluster where the slots are, when that is needed and not known. One Redis has them all.
class RedisNodes {
 public:
  // `max_connections`: to each node.
  RedisNodes(RedisLocation location, int max_connections);

  bool cluster() const { return location_.cluster; }
  // The node that has the key. UNAVAILABLE: no node knows, or no node has it.
  absl::StatusOr<std::shared_ptr<RedisPool>> Owner(absl::string_view key, absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  // All nodes that have keys.
  absl::StatusOr<std::vector<std::shared_ptr<RedisPool>>> Primaries(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  std::shared_ptr<RedisPool> At(const RedisEndpoint& endpoint) ABSL_LOCKS_EXCLUDED(mu_);
  // Slots have moved, or a node has gone: the next call asks again. With `knowing`, that node first.
  void Forget() ABSL_LOCKS_EXCLUDED(mu_);
  void Forget(const RedisEndpoint& knowing) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct SlotOwner {
    int first = 0;
    std::shared_ptr<RedisPool> pool;
  };
  absl::Status FindSlots(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  // In the order in which they are to be asked.
  std::vector<std::shared_ptr<RedisPool>> Candidates() ABSL_LOCKS_EXCLUDED(mu_);
  void Assign(const std::vector<RedisSlotRange>& ranges) ABSL_LOCKS_EXCLUDED(mu_);
  std::shared_ptr<RedisPool> Pool(const RedisEndpoint& endpoint) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const RedisLocation location_;
  const int max_connections_;
  absl::Mutex mu_;
  std::map<RedisEndpoint, std::shared_ptr<RedisPool>> pools_ ABSL_GUARDED_BY(mu_);
  std::map<int, SlotOwner> owners_ ABSL_GUARDED_BY(mu_);  // by last slot
  bool known_ ABSL_GUARDED_BY(mu_) = false;               // owners_ holds as far as we know
  std::shared_ptr<RedisPool> knowing_ ABSL_GUARDED_BY(mu_);
  size_t turn_ ABSL_GUARDED_BY(mu_) = 0;  // whose turn it is to be asked
};

}  // namespace orrery
