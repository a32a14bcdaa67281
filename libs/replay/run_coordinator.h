// Who may do what next in a run: hands out episodes, paces the learner, keeps leases. All state is one small value in the
// store, changed by compare-and-set, so any number of replay servers agree and none needs to remember anything.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "libs/base/clock.h"
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

// What a run amounts to whose episodes were all played elsewhere.
struct PlayedRun {
  std::string run_id;
  uint64_t specification_hash = 0;
  int64_t last_episode = 0;  // the highest number
  int64_t training_episodes = 0;
  int64_t training_rows = 0;  // up to the last one of each episode
};

// Thread-safe; never waits: where the schedule does not allow something now, the answer says so (nullopt, 0) and the caller
// tries again when something has changed. ALTERNATE: the first collection.seed_episodes are RANDOM; then the learner
// owes initial_updates, and updates_per_episode after each further one; a further episode begins only when the learner has
// reported all it owes and no other episode is running, so several actors take turns; evaluation.episodes EVALUATE episodes
// of each task come after every evaluation.every_episodes training episodes, seed episodes not counted. CONCURRENT:
// replay.limiter holds updates per row inside the band; a side absent for limiter.absent_seconds does not block the other.
// With several tasks the n-th training episode plays the n-th task, round and round. With collection.random_actions, every
// training episode is RANDOM.
//
// When a call has returned OK, what it did is in the store, with one exception: rows of an episode that goes on may be counted
// here first. They are part of every answer of this object, and are written with whatever is written next, at the latest by
// the first call that comes kRowsDelay after the oldest of them. A replica that dies loses at most these counts; the next chunk
// of the episode makes up for them. Leases do not wait: a chunk that renews one is written at once.
//
// Threads that come at the same time share one write; when it fails, each of them gets its error. While no other replica writes,
// the state is neither fetched nor parsed again.
class RunCoordinator {
 public:
  // `store` and `clock` must outlive this. Leases go by the store's clock, kRowsDelay by `clock`.
  RunCoordinator(Store* store, config::v1::Experiment experiment, Clock& clock = Clock::Real());
  ~RunCoordinator();

  // The next episode, or nullopt when none may begin now. FAILED_PRECONDITION: another specification hash than the run's.
  // `request_id` (at most 64 bytes) names the question: while an episode that this actor was given for it runs and has no rows,
  // that one is given again, with a renewed lease, and none begins. Empty: every call is a question of its own. `check` is
  // called just before an answer is settled, on any thread and perhaps several times: its error is the answer.
  absl::StatusOr<std::optional<EpisodeAssignment>> BeginEpisode(const std::string& actor_id, uint64_t specification_hash,
                                                                const std::string& request_id = "",
                                                                const std::function<absl::Status()>& check = nullptr);
  // Rows of a running episode arrived; renews its lease; `end` other than kContinues finishes it, which is written at once.
  // Calling it twice for the same chunk counts once (rows are counted up to the highest row seen).
  absl::Status RecordChunk(const ChunkInfo& info);
  // Writes the rows that wait: for the end of a stream of chunks.
  absl::Status WriteRows();
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
  // Reports updates_done, renews the lease, and grants up to `wanted`. FAILED_PRECONDITION: the generation is not the holder, or
  // has released the run.
  absl::StatusOr<Grant> ReserveUpdates(int64_t generation, int64_t updates_done, int32_t wanted);
  // The same report from a learner that ends: another one may take over at once. FAILED_PRECONDITION as above.
  absl::Status ReleaseLearner(int64_t generation, int64_t updates_done);
  absl::StatusOr<RunProgress> Progress();
  // Calls that wait for the store now, for tests.
  int waiting() const;

  // Identity of the run that a store holds; empty: it has no state of a run yet. DATA_LOSS: that is damaged.
  static absl::StatusOr<std::string> RunIdOf(Store& store);
  // Gives a store the state of a run that has played these episodes and learnt nothing from them. ABORTED: it has a state.
  static absl::Status WritePlayed(Store& store, const PlayedRun& run);

  static constexpr int kLearnerLeaseSeconds = 30;
  static constexpr absl::Duration kRowsDelay = absl::Milliseconds(100);

 private:
  struct State;
  // Alters the state, or returns an error and leaves it alone: it is written with what others changed beside it. May be called
  // several times, each time with another state. The time is the store's.
  using Change = std::function<absl::Status(State&, absl::Time)>;
  struct Call;
  // Rows that are not in the store yet.
  struct Notes {
    std::unordered_map<int64_t, int64_t> rows;  // by episode: up to the highest row seen
    absl::Time write_by = absl::InfiniteFuture();
    void Add(int64_t episode_id, int64_t up_to, absl::Time by);
    bool Due(absl::Time now) const;
  };
  // Until when news of a running episode alter nothing but its rows, by clock_. Holds from `since` on: a clock that was set
  // back must not stop leases from being renewed.
  struct Quiet {
    absl::Time since;
    std::unordered_map<int64_t, absl::Time> until;  // by episode
    bool Has(int64_t episode_id, absl::Time now) const;
  };

  // Lets `change` alter the state and writes it if it was altered; again when another replica came first.
  absl::Status Mutate(const Change& change) ABSL_LOCKS_EXCLUDED(mu_);
  // True when the rows can wait to be written.
  bool Note(int64_t episode_id, int64_t rows) ABSL_LOCKS_EXCLUDED(mu_);
  // True when no lease of theirs needs to be renewed yet and nothing else is due to be written.
  bool Rest(const std::vector<int64_t>& episode_ids) const ABSL_LOCKS_EXCLUDED(mu_);
  // Serves all that are in the queue now. Gives mu_ up meanwhile; the one who calls it is the first in the queue.
  void ServeQueue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What ServeQueue does with the store. Leaves in `notes` what is still to be written. An error is that of all calls.
  absl::Status Commit(absl::Span<Call* const> calls, Notes& notes) ABSL_LOCKS_EXCLUDED(mu_);
  // Makes state_ the one in the store and returns the store's time.
  absl::StatusOr<absl::Time> Refresh();
  absl::Status Write(State state);
  void UpdateQuiet(absl::Time local, absl::Time now) ABSL_LOCKS_EXCLUDED(mu_);
  std::optional<EpisodeMode> NextMode(const State& state, absl::Time now) const;
  // The next episode of that mode, counted as handed out.
  EpisodeAssignment HandOut(State& state, EpisodeMode mode) const;
  int64_t UpdatesAllowed(const State& state, absl::Time now) const;
  bool HandedOutAll(const State& state) const;
  static absl::Status NoteProgress(State& state, int64_t generation, int64_t updates_done);
  bool Complete(const State& state) const;

  Store* const store_;
  const config::v1::Experiment experiment_;
  const std::vector<config::v1::Environment> tasks_;
  Clock& clock_;

  mutable absl::Mutex mu_;
  std::deque<Call*> queue_ ABSL_GUARDED_BY(mu_);
  Notes notes_ ABSL_GUARDED_BY(mu_);
  Quiet quiet_ ABSL_GUARDED_BY(mu_);

  // Only the thread of the first call in the queue touches these.
  std::unique_ptr<State> state_;  // as in the store when last seen there
  int64_t version_ = 0;           // of state_
  ValueIdentity known_;           // of state_; version 0: state_ is to be read anew
};

// INVALID_ARGUMENT for pacing that could never make progress (seed episodes too short for one sequence and so on is seen
// at run time; a limiter whose band is narrower than one episode or chunk is seen here).
absl::Status ValidatePacing(const config::v1::Experiment& experiment);

}  // namespace orrery
