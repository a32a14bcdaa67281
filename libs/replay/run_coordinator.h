// Who may do what next in a run: hands out episodes, paces the learner, keeps leases. All state is one small value in the
// store, changed by compare-and-set, so any number of replay servers agree and none needs to remember anything.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "libs/config/config.h"
#include "libs/replay/store.h"

namespace orrery {

struct EpisodeAssignment {
  std::string run_id;
  int64_t episode_id = 0;
  EpisodeMode mode = EpisodeMode::kRandom;
  std::string task;
  uint64_t seed = 0;
  bool run_complete = false;  // nothing was handed out
};

struct RunProgress {
  std::string run_id;               // empty: no episode was begun yet
  uint64_t specification_hash = 0;  // the run's; 0: no episode was begun yet
  int64_t rows_appended = 0;      // training rows of finished and running episodes, as reported
  int64_t episodes_started = 0;   // training episodes
  int64_t episodes_finished = 0;  // training episodes finished or abandoned
  int64_t updates_done = 0;
};

// Thread-safe; never waits: where the schedule does not allow something now, the answer says so (nullopt, 0) and the caller
// tries again when something has changed. ALTERNATE: the first collection.seed_episodes are RANDOM; then the learner
// owes initial_updates, and updates_per_episode after each further one; a further episode begins only when the learner has
// reported all it owes and no other episode is running, so several actors take turns; evaluation.episodes EVALUATE episodes
// of each task come after every evaluation.every_episodes training episodes, seed episodes not counted. CONCURRENT:
// replay.limiter holds updates per row inside the band; a side absent for limiter.absent_seconds does not block the other.
// With several tasks the n-th training episode plays the n-th task, round and round. With collection.random_actions, every
// training episode is RANDOM.
class RunCoordinator {
 public:
  // `store` must outlive this.
  RunCoordinator(Store* store, config::v1::Experiment experiment);

  // The next episode, or nullopt when none may begin now. FAILED_PRECONDITION: another specification hash than the run's.
  absl::StatusOr<std::optional<EpisodeAssignment>> BeginEpisode(const std::string& actor_id, uint64_t specification_hash);
  // Rows of a running episode arrived; renews its lease; `end` other than kContinues finishes it. Calling it twice for the
  // same chunk counts once (rows are counted up to the highest row seen).
  absl::Status RecordChunk(const ChunkInfo& info);
  // NOT_FOUND when an episode is not running any more is not an error here: it is skipped.
  absl::Status RenewLeases(const std::vector<int64_t>& episode_ids);
  // ALREADY_EXISTS while another learner's lease holds. Returns the new generation (the same one for the holder itself
  // when it asks again).
  absl::StatusOr<int64_t> AcquireLearner(const std::string& learner_id);
  struct Grant {
    int32_t updates = 0;
    // Every training episode has finished, every update that belongs to them is reported and no evaluation is left.
    bool run_complete = false;
  };
  // Reports updates_done, renews the lease, and grants up to `wanted`. FAILED_PRECONDITION: the generation is not the holder.
  absl::StatusOr<Grant> ReserveUpdates(int64_t generation, int64_t updates_done, int32_t wanted);
  // The same report from a learner that ends: another one may take over at once. FAILED_PRECONDITION as above.
  absl::Status ReleaseLearner(int64_t generation, int64_t updates_done);
  absl::StatusOr<RunProgress> Progress();

  static constexpr int kLearnerLeaseSeconds = 30;

 private:
  struct State;
  // Reads the state, lets `change` alter it, and writes it if it was altered; again when another replica came first.
  absl::Status Mutate(const std::function<absl::Status(State&, absl::Time)>& change) ABSL_LOCKS_EXCLUDED(mu_);
  absl::Status Write(const VersionedValue& old, State& state) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::optional<EpisodeMode> NextMode(const State& state, absl::Time now) const;
  int64_t UpdatesAllowed(const State& state, absl::Time now) const;
  bool HandedOutAll(const State& state) const;
  static absl::Status NoteProgress(State& state, int64_t generation, int64_t updates_done);
  bool Complete(const State& state) const;

  Store* const store_;
  const config::v1::Experiment experiment_;
  const std::vector<config::v1::Environment> tasks_;
  // Only replicas compete for the value in the store, not the threads of this process.
  absl::Mutex mu_;
};

// INVALID_ARGUMENT for pacing that could never make progress (seed episodes too short for one sequence and so on is seen
// at run time; a limiter whose band is narrower than one episode or chunk is seen here).
absl::Status ValidatePacing(const config::v1::Experiment& experiment);

}  // namespace orrery
