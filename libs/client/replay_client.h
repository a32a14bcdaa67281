// C++ client of the replay service: retries, an acknowledged writer, and a watcher that survives reconnects.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/base/array.h"
#include "libs/base/clock.h"
#include "libs/replay/run_coordinator.h"
#include "libs/replay/store.h"
#include "orrery/replay/v1/replay.grpc.pb.h"

namespace orrery {

// Unary and snapshot calls. Thread-safe. UNAVAILABLE is retried with jitter until the deadline; other errors are returned.
class ReplayClient {
 public:
  ReplayClient(std::shared_ptr<grpc::Channel> channel, std::string run);
  virtual ~ReplayClient() = default;

  struct Episode {
    EpisodeAssignment assignment;
    int lease_seconds = 0;
  };
  // nullopt: none may begin before the deadline. After no answer, or an error that is not final, the next call for this actor
  // asks the same question again (BeginEpisodeRequest.request_id): an episode whose answer was lost is played all the same.
  virtual absl::StatusOr<std::optional<Episode>> BeginEpisode(const std::string& actor_id, uint64_t specification_hash,
                                                              absl::Time deadline);
  virtual absl::StatusOr<int64_t> AcquireLearner(const std::string& learner_id, absl::Time deadline);
  // Waits on the server for at most `deadline`; 0 granted when none may be made until then.
  virtual absl::StatusOr<RunCoordinator::Grant> ReserveUpdates(int64_t generation, int64_t updates_done, int32_t wanted,
                                                               absl::Time deadline);
  // The last report: another learner may take over at once.
  virtual absl::Status ReleaseLearner(int64_t generation, int64_t updates_done, absl::Time deadline);
  virtual absl::Status PutSnapshot(const Store::Snapshot& snapshot, absl::Time deadline);
  virtual absl::StatusOr<Store::Snapshot> GetSnapshot(absl::Time deadline);  // NOT_FOUND: none
  virtual absl::StatusOr<replay::v1::GetStatsResponse> GetStats(absl::Time deadline);
  // At most `max` (1 to 1000) stored episodes of a mode (unspecified: of any) from number `first` on, in their order.
  virtual absl::StatusOr<replay::v1::ListEpisodesResponse> ListEpisodes(int64_t first, int max, replay::v1::EpisodeMode mode,
                                                                        absl::Time deadline);
  // The stored chunks of one episode by row, at least one. NOT_FOUND: none is stored, or one was evicted meanwhile.
  virtual absl::StatusOr<std::vector<Chunk>> GetEpisode(int64_t episode_id, absl::Time deadline);

  const std::string& run() const { return run_; }
  std::shared_ptr<grpc::Channel> channel() const { return channel_; }

 private:
  // Id of a question of this actor that waits for its answer, which nobody else asks meanwhile, or a new one.
  std::string TakeQuestion(const std::string& actor_id);

  // Constant after construction.
  const std::shared_ptr<grpc::Channel> channel_;
  const std::string run_;

  absl::Mutex mu_;
  std::unordered_multimap<std::string, std::string> unanswered_ ABSL_GUARDED_BY(mu_);  // ids of questions by actor
};

// Sends chunks and keeps each until it is acknowledged, across reconnects and restarts of the service. Thread-safe.
class ReplayWriter {
 public:
  struct Options {
    int64_t max_unacknowledged_bytes = 64 << 20;
    absl::Duration heartbeat = absl::Seconds(10);  // leases of open episodes are renewed this often
  };
  static std::unique_ptr<ReplayWriter> Create(std::shared_ptr<grpc::Channel> channel, std::string run, Options options);
  virtual ~ReplayWriter() = default;
  // Queues a chunk; waits while it would not fit (one chunk always fits alone). DEADLINE_EXCEEDED: still full then.
  // ALREADY_EXISTS and other final errors of the service are returned by every later call about the same episode. The chunk
  // carries the calling thread's trace (libs/base/trace.h).
  virtual absl::Status Append(Chunk chunk, absl::Time deadline) = 0;
  // Waits until everything queued is acknowledged.
  virtual absl::Status Flush(absl::Time deadline) = 0;
  // Episodes whose leases the heartbeat renews.
  virtual void KeepAlive(std::vector<int64_t> episode_ids) = 0;
  virtual int64_t unacknowledged_bytes() const = 0;
};

// Follows the data set: every live chunk once (repeats are removed by key), then changes. One consumer thread; Close from any.
class ChunkWatcher {
 public:
  struct Event {
    bool reset = false;  // forget everything: the watch began anew (all live chunks follow)
    std::optional<Chunk> appended;
    std::optional<ChunkKey> evicted;
    bool caught_up = false;    // nothing newer was there
    bool interrupted = false;  // from now on changes may come late, until it has caught up again
  };
  static std::unique_ptr<ChunkWatcher> Create(std::shared_ptr<grpc::Channel> channel, std::string run,
                                              bool include_evaluation = false);
  virtual ~ChunkWatcher() = default;
  // The next event; reconnects inside. DEADLINE_EXCEEDED: none until then. CANCELLED: closed.
  virtual absl::StatusOr<Event> Next(absl::Time deadline) = 0;
  virtual void Close() = 0;
};

}  // namespace orrery
