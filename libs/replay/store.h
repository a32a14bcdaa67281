// Where the experience of a run lives. Three implementations behind one conformance suite: memory, file, Redis.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "libs/base/random.h"

namespace orrery {

enum class EpisodeMode : uint8_t { kRandom = 1, kTrain = 2, kEvaluate = 3 };
enum class EpisodeEnd : uint8_t { kContinues = 1, kTerminated = 2, kTruncated = 3 };

// (generation, counter); ordered. {0, 0}: none.
struct SnapshotVersion {
  int64_t generation = 0;
  int64_t counter = 0;
  auto operator<=>(const SnapshotVersion&) const = default;
};

struct ChunkKey {
  int64_t episode_id = 0;
  int64_t first_row = 0;
  auto operator<=>(const ChunkKey&) const = default;
};

// Everything about a chunk but its rows: what an index needs.
struct ChunkInfo {
  ChunkKey key;
  int32_t rows = 0;
  EpisodeMode mode = EpisodeMode::kTrain;
  EpisodeEnd end = EpisodeEnd::kContinues;
  uint64_t specification_hash = 0;
  SnapshotVersion snapshot_version;
  double reward_sum = 0;
  int64_t payload_bytes = 0;
  int32_t task = 0;  // of the episode: its place in the configuration's list, 0 when there is only one
  bool operator==(const ChunkInfo&) const = default;
};

// An immutable chunk with its encoded rows (libs/replay/chunk_codec.h).
struct Chunk {
  std::string run_id;
  ChunkInfo info;
  std::string payload;
  bool operator==(const Chunk&) const = default;
};

// One entry of the change log.
struct Change {
  enum class Kind : uint8_t { kAppend = 1, kEvict = 2 };
  Kind kind = Kind::kAppend;
  ChunkInfo info;
};

struct ChangeBatch {
  std::vector<Change> changes;
  std::string cursor;      // where to go on
  bool caught_up = false;  // nothing newer was there when this was read
};

// A small value with a version for compare-and-set. Version 0: not there.
struct VersionedValue {
  std::string value;
  int64_t version = 0;
};

// The version of the value that follows the one with version `before`: at least 1. It comes from both, so it names the value
// with all that went before it. When a store falls back to an older state, as after a failover, and goes on from there with
// other values, none of them has a version that was seen before.
inline int64_t NextVersion(int64_t before, const std::string& value) {
  const uint64_t seed = DeriveSeed(static_cast<uint64_t>(before), value) >> 1;  // 63 bits
  return seed == 0 ? 1 : static_cast<int64_t>(seed);
}

// Tells a value from the others under its name; also from one that somebody set by hand and left the version as it was.
// Version 0: no value.
struct ValueIdentity {
  int64_t version = 0;
  uint64_t hash = 0;
  bool operator==(const ValueIdentity&) const = default;
};
inline uint64_t ValueHash(const std::string& value) { return DeriveSeed(0, value); }
inline ValueIdentity IdentityOf(const VersionedValue& value) { return {value.version, ValueHash(value.value)}; }

// The data of one run. Thread-safe; every call may block on the network or disk for at most the store's timeout.
// UNAVAILABLE: cannot be reached, try again. RESOURCE_EXHAUSTED: full. DATA_LOSS: damaged, names the place.
// FAILED_PRECONDITION: made by another schema version.
class Store {
 public:
  virtual ~Store() = default;

  // Stores the chunk; once OK is returned it survives the death of this process (for memory: it does not).
  // The same chunk again is OK and changes nothing; other contents under its key: ALREADY_EXISTS.
  // A chunk that was evicted already is OK and stays evicted if the store still knows it, else it is stored anew.
  virtual absl::Status Append(const Chunk& chunk) = 0;
  // The chunks in the order asked for; an evicted or unknown one is nullopt.
  virtual absl::StatusOr<std::vector<std::optional<Chunk>>> Read(absl::Span<const ChunkKey> keys) = 0;
  // Changes after `cursor`, at most `max`; an empty cursor first lists every live chunk as kAppend (by episode and row),
  // then goes on with the log. Waits up to `wait` when there is nothing new and then returns an empty batch; with an empty
  // cursor it never waits, so that a reader learns at once that an empty store is empty. Every chunk that stays live is
  // reported at least once; a reader tolerates repeats.
  // OUT_OF_RANGE: the cursor is too old or from another data set; begin with an empty one.
  virtual absl::StatusOr<ChangeBatch> Changes(const std::string& cursor, int max, absl::Duration wait) = 0;
  // Removes chunks; unknown ones are skipped.
  virtual absl::Status Evict(absl::Span<const ChunkKey> keys) = 0;

  // Small run state ("run", "learner", …). Get of an unknown name gives version 0.
  virtual absl::StatusOr<VersionedValue> Get(const std::string& name) = 0;
  // What Now and Get say, in one round trip where the store has one: for callers that ask often. A value that is still the
  // one `known` is left out, so it is not sent; known.version 0: none is.
  struct TimedValue {
    absl::Time now;
    std::optional<VersionedValue> value;
  };
  virtual absl::StatusOr<TimedValue> GetUnlessKnown(const std::string& name, const ValueIdentity& known) {
    absl::StatusOr<VersionedValue> value = Get(name);
    if (!value.ok()) return value.status();
    const absl::StatusOr<absl::Time> now = Now();
    if (!now.ok()) return now.status();
    TimedValue answer{*now, std::nullopt};
    if (known.version == 0 || IdentityOf(*value) != known) answer.value = *std::move(value);
    return answer;
  }
  // Sets the value if its version is still `expected_version` (0: not there); the new version is
  // NextVersion(expected_version, value). ABORTED: it changed meanwhile.
  virtual absl::Status CompareAndSet(const std::string& name, int64_t expected_version, const std::string& value) = 0;

  // The newest snapshot, a whole safetensors file. Put ignores a version that is not above the kept one.
  struct Snapshot {
    SnapshotVersion version;
    std::string file;
  };
  virtual absl::Status PutSnapshot(const Snapshot& snapshot) = 0;
  virtual absl::StatusOr<Snapshot> GetSnapshot() = 0;  // NOT_FOUND: none

  // The store's own clock, for leases: replicas agree on it.
  virtual absl::StatusOr<absl::Time> Now() = 0;
};

// Opens the data of `run` at a location: "memory:", "file:FOLDER", "redis://[user:password@]HOST:PORT" or
// "redis-cluster://[user:password@]HOST:PORT[,HOST:PORT…]" (some of the cluster's nodes, one that answers is enough).
// Other replicas may have the same Redis location open. `partitions` applies to new data sets in Redis. A password that the
// location lacks may be in an environment variable (store_password.h); so for ListDataSets and DeleteDataSet.
// INVALID_ARGUMENT names the location and the forms expected.
struct StoreOptions {
  std::string location;
  std::string run;
  int partitions = 4;
  absl::Duration timeout = absl::Seconds(5);
  // Changes kept for readers that lag; one that is further behind starts again with an empty cursor.
  int change_log_length = 100000;
  // To each Redis, 1 to 10000; a call that finds all in use waits its turn within the timeout. Each reader that waits for
  // changes has one more (in a cluster one for each partition).
  int max_connections = 64;
};
absl::StatusOr<std::unique_ptr<Store>> OpenStore(const StoreOptions& options);

// The data sets at a location, by name. Nothing is kept in memory:, so there it is always empty. Also works while they are in
// use; then the numbers are of some moment. INVALID_ARGUMENT as OpenStore; NOT_FOUND: the folder is not there.
struct DataSetSummary {
  std::string run;
  int64_t chunks = 0;
  int64_t bytes = 0;  // of payloads
  bool operator==(const DataSetSummary&) const = default;
};
absl::StatusOr<std::vector<DataSetSummary>> ListDataSets(const std::string& location, absl::Duration timeout);

// Removes the data set of options.run with everything in it: chunks, run state, snapshot. NOT_FOUND when there is none;
// FAILED_PRECONDITION when a process has it open (files) or writes to it (Redis), or another schema version made it.
absl::Status DeleteDataSet(const StoreOptions& options);

}  // namespace orrery
