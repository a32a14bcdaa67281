// Plays episodes: asks replay what to play, the planner how, and sends the rows to replay.
#pragma once

#include <grpcpp/grpcpp.h>
#include <prometheus/registry.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/base/trace.h"
#include "libs/client/channel.h"
#include "libs/client/replay_client.h"
#include "libs/config/config.h"
#include "libs/envs/environment.h"
#include "libs/envs/tasks.h"
#include "libs/envs/vector_environment.h"
#include "libs/replay/store.h"
#include "orrery/planner/v1/planner.grpc.pb.h"

namespace orrery {

// An episode that this actor has played.
struct EpisodeSummary {
  int64_t episode_id = 0;
  EpisodeMode mode = EpisodeMode::kRandom;
  EpisodeEnd end = EpisodeEnd::kTruncated;
  std::string task;
  double episode_return = 0;
  int64_t rows = 0;               // decisions + 1
  int64_t environment_steps = 0;  // decisions * action repeat
  double seconds = 0;
};

// Uniform in [-1, 1), or a uniform choice; the same on every machine.
std::vector<float> RandomAction(const ActionSpec& spec, std::mt19937_64& random);

// What the planner is asked for one agent: the observation, and, unless an episode or a belief begins (`belief` empty), the
// belief and the action executed since.
planner::v1::Slot MakeSlot(const ArrayMap& observation, const std::string& belief,
                           const std::vector<float>& previous_action, uint64_t seed);

struct ActorOptions {
  config::v1::Experiment experiment;  // validated
  std::string actor_id;               // unique among actors
  std::shared_ptr<grpc::Channel> replay;
  std::shared_ptr<grpc::Channel> planner;
  std::string model;  // that the planner is asked for; empty: the only one it serves
  std::shared_ptr<prometheus::Registry> registry;
  absl::Duration act_timeout = absl::Seconds(60);
  // Called on the thread of Run after every episode that was played to its end, once its last chunk was handed over. May be
  // empty.
  std::function<void(const EpisodeSummary&)> on_episode;
  EnvironmentMaker make_environment = MakeEnvironment;  // called on several threads at once
  // After which an environment that does not return counts as failed.
  absl::Duration environment_timeout = absl::Seconds(60);
  // Those environments whose observation has come wait so long, from the beginning of the others' steps, for the others: one
  // question to the planner costs less than several. ALTERNATE waits for all, so that one seed gives one run.
  absl::Duration patience = absl::Milliseconds(20);
};

// One actor with collection.environments environments, which step at the same time (VectorEnvironment): one that takes long does
// not hold up the others, and no episode depends on what else is played. Run (or Step and Finish) on one thread; Stop from any,
// it is noticed within a second. Replay or planner away: waits and goes on with the episode; an episode that replay does not
// want any more is dropped. An environment that fails, does not return, or delivers what its specification does not allow, ends
// its episode as truncated and is made anew for the next one; after kMaxFailures episodes in a row Run ends with its error.
// Errors that trying again cannot cure (an environment that does not fit the run, a request refused as invalid) end Run with a
// status that names them.
class Actor {
 public:
  // INVALID_ARGUMENT or NOT_FOUND when the task cannot be made.
  static absl::StatusOr<std::unique_ptr<Actor>> Create(ActorOptions options);
  ~Actor();

  // Plays until the run is complete, Stop or an error, then Finish.
  absl::Status Run();
  // Begins episodes where environments are idle and makes one decision in each that waits for one. False: nothing more to do.
  absl::StatusOr<bool> Step();
  // Sends what running episodes have, marked as truncated, and waits some seconds for the acknowledgements.
  void Finish();
  void Stop();

  static constexpr int kMaxFailures = 5;

 private:
  struct Decision {
    std::vector<float> action;
    SnapshotVersion version;  // that chose it
  };
  // One environment and the episode in it.
  struct Player {
    int index = 0;                                // of its environment
    const EnvironmentOptions* options = nullptr;  // its task
    bool running = false;                         // an episode was begun
    Decision decision;                            // that the environment executes
    EpisodeAssignment assignment;
    TraceContext trace;  // of the episode: all calls and log lines about it
    absl::Time begin;
    std::mt19937_64 random;    // RANDOM: actions
    std::string belief;        // empty: the planner begins a new one
    std::vector<float> previous_action;  // empty: row 0
    int64_t decisions = 0;
    double episode_return = 0;
    int failed_rows = 0;       // as Collection.early_end counts
    // Rows not yet sent; the last one is acted on. At least one while running, so that an end can always be told.
    std::vector<TimeStep> rows;
    std::vector<std::vector<float>> actions;  // that led to each row
    int64_t first_row = 0;
    SnapshotVersion version;   // newest that chose an action in `rows`
    SnapshotVersion pinned;    // EVALUATE: that of the episode's first answer; none before it
  };

  explicit Actor(ActorOptions options);

  bool Stopped() const;
  void Pause(absl::Duration duration);
  absl::StatusOr<const EnvironmentOptions*> FindTask(const std::string& name) const;
  // An observation is there, and no action yet.
  bool Waits(const Player& player) const { return player.running && !environments_->busy(player.index); }
  // Tries to begin an episode in every idle player. False: the run is complete and nothing is running.
  absl::StatusOr<bool> BeginEpisodes();
  absl::Status Begin(Player& player, const ReplayClient::Episode& episode);
  // Takes what the environments have delivered. Waits for one unless a player can be given an action now.
  absl::Status Collect();
  // One per player; no action where none waits for one or the planner does not answer now.
  absl::StatusOr<std::vector<Decision>> Decide();
  // The call is in the first one's trace and names those of the others.
  static void SendTraces(const std::vector<Player*>& planned, grpc::ClientContext& context);
  absl::Status ActOnce(const std::vector<Player*>& planned, planner::v1::ActResponse& response);
  // After an error that may pass: when to ask again, and a line in the log.
  void NotePlannerAway(const absl::Status& status);
  // Asks for the players, who all have the same `pinned`, and takes their beliefs over. False: no answer now.
  absl::StatusOr<bool> DecideTogether(const std::vector<size_t>& players, std::vector<Decision>& decisions);
  // False: no answer now, try again later.
  absl::StatusOr<bool> Act(const std::vector<Player*>& planned, planner::v1::ActResponse& response);
  absl::Status Execute(Player& player, Decision decision);
  // With what Reset or Step delivered.
  absl::Status Advance(Player& player, absl::StatusOr<TimeStep> step);
  // Whether collection.early_end cuts the episode with this row's reward.
  bool HasFailed(Player& player, double reward) const;
  // Encodes and queues the rows; drops the episode when replay refuses it.
  absl::Status SendRows(Player& player, EpisodeEnd end);
  absl::Status End(Player& player, EpisodeEnd end);
  void Drop(Player& player, const absl::Status& why);
  // The environment failed in this episode. Returns the error once there were too many in a row.
  absl::Status Fail(Player& player, const absl::Status& why);
  void FlushBefore(absl::Time deadline);
  void RenewLeases();
  int Running() const;

  // Constant after construction.
  const ActorOptions options_;
  const bool alternate_;
  std::vector<EnvironmentOptions> tasks_;
  std::unique_ptr<VectorEnvironment> environments_;
  EnvironmentSpec spec_;
  uint64_t specification_hash_ = 0;
  const std::unique_ptr<planner::v1::PlannerService::Stub> planner_;
  const std::unique_ptr<ReplayClient> replay_;
  const std::unique_ptr<ReplayWriter> writer_;
  struct Metrics;
  const std::unique_ptr<Metrics> metrics_;

  // Of the thread of Run.
  std::vector<Player> players_;
  Backoff planner_backoff_;
  Backoff replay_backoff_;
  absl::Time planner_away_since_ = absl::InfiniteFuture();  // that: it is not
  bool planner_away_told_ = false;
  bool replay_away_ = false;
  bool complete_ = false;
  int failures_ = 0;  // episodes in a row in which an environment failed
  absl::Time next_begin_ = absl::InfinitePast();
  absl::Time next_act_ = absl::InfinitePast();

  mutable absl::Mutex mu_;
  absl::CondVar stop_changed_;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  grpc::ClientContext* act_in_flight_ ABSL_GUARDED_BY(mu_) = nullptr;
};

}  // namespace orrery
