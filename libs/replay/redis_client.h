// A small client of a Redis or a Redis Cluster, for the Redis store.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "libs/replay/redis_connection.h"
#include "libs/replay/redis_location.h"
#include "libs/replay/redis_nodes.h"

namespace orrery {

// Thread-safe. A call takes at most about `timeout` (Await its `wait` beside that, Scan so much for each step) and uses one of
// the `max_connections` to each node, for which it may have to wait; Await has some of its own beside them. In a cluster
// each command goes to the node that has its key: the word after the command, or the first key of a script. Redirections are
// followed; while slots move, a node loads its data or a replica takes over, commands are sent again until the timeout has
// passed. Errors name the node: those of RedisErrorStatus, and UNAVAILABLE when there is no connection or no answer in time.
class RedisClient {
 public:
  RedisClient(RedisLocation location, absl::Duration timeout, int max_connections);
  ~RedisClient();

  // Loads a script into Redis and returns its SHA-1, by which Script() calls it.
  absl::StatusOr<std::string> LoadScript(const std::string& source);
  // The command that runs a loaded script; a Redis that does not know it is sent the source. `keys`: at least one, all with the
  // same hash tag.
  static RedisCommand Script(const std::string& sha, absl::Span<const std::string> keys, std::vector<std::string> arguments);

  // Sends the commands and waits for their replies; those for one node are sent at once and done in order. An error reply to
  // any of them is an error. `repeatable`: commands may be done twice, when a connection breaks before the answer.
  absl::StatusOr<std::vector<RedisReply>> Run(const std::vector<RedisCommand>& commands, bool repeatable = true);
  absl::StatusOr<RedisReply> RunOne(RedisCommand command, bool repeatable = true);

  // Waits up to `wait` until one of the streams has an entry after its `id`. May return early: look, and wait again.
  struct StreamPosition {
    std::string key;
    std::string id;
  };
  absl::Status Await(absl::Span<const StreamPosition> streams, absl::Duration wait);

  // Visits the keys that match a pattern, at every node and in batches: each key that is there all the time at least once,
  // unless its slot moves meanwhile. Ends with the visitor's error, if it has one.
  using KeyVisitor = std::function<absl::Status(const std::vector<std::string>& keys)>;
  absl::Status Scan(const std::string& pattern, const KeyVisitor& visit);

 private:
  struct Call;
  // A connection for a blocking XREAD.
  struct Watch {
    std::shared_ptr<RedisPool> pool;
    std::unique_ptr<RedisConnection> connection;
    bool waiting = false;  // it has not been answered yet
    absl::Time expires;    // Redis answers until then
  };

  // One go at the commands of a call that have no reply yet; at those of one node; at one that another node is to be asked for.
  // Returned are errors that another go would not mend; the others stay in the call.
  absl::Status Try(Call& call);
  absl::Status TryAt(RedisPool& pool, const std::vector<size_t>& indices, Call& call);
  absl::Status TryElsewhere(RedisPool& pool, size_t index, Call& call);
  absl::Status Accept(const RedisEndpoint& from, size_t index, RedisReply reply, bool asked, Call& call);

  // Sends commands to one node and returns their replies, errors among them. `sent` is set once they may have arrived.
  absl::StatusOr<std::vector<RedisReply>> Exchange(RedisPool& pool, absl::Span<const RedisCommand* const> commands,
                                                   bool repeatable, absl::Time deadline, bool& sent);
  absl::Status RunUnknownScripts(RedisConnection& connection, absl::Span<const RedisCommand* const> commands,
                                 std::vector<RedisReply>& replies, absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);

  absl::StatusOr<Watch> StartWatch(absl::Span<const StreamPosition> streams, absl::Duration wait) ABSL_LOCKS_EXCLUDED(mu_);
  // Takes the answer of a watch, which is without a connection when that broke. False: it says nothing of the stream.
  absl::StatusOr<bool> EndWatch(Watch& watch);

  const absl::Duration timeout_;
  RedisNodes nodes_;
  absl::Mutex mu_;
  std::map<std::string, std::string> scripts_ ABSL_GUARDED_BY(mu_);  // by SHA-1
  std::map<std::string, Watch> watches_ ABSL_GUARDED_BY(mu_);        // for the next Await; by first key
};

}  // namespace orrery
