#include "libs/replay/run_coordinator.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_text.h"

namespace orrery {
namespace {

using config::v1::Learning;
using nlohmann::json;

constexpr char kValueName[] = "run";
constexpr int kMaxAttempts = 64;
constexpr size_t kMaxActorIdBytes = 128;
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

struct RunningEpisode {
  int64_t id = 0;
  EpisodeMode mode = EpisodeMode::kRandom;
  std::string actor_id;   // for people who look at the state
  int64_t rows = 0;       // up to the highest row seen
  int64_t expires = 0;    // microseconds since 1970, by the store's clock
};

struct LearnerLease {
  std::string id;
  int64_t generation = 0;
  int64_t expires = 0;
  int64_t seen = 0;
};

void to_json(json& j, const RunningEpisode& e) {
  j = {{"id", e.id}, {"mode", static_cast<int>(e.mode)}, {"actor_id", e.actor_id}, {"rows", e.rows}, {"expires", e.expires}};
}
void from_json(const json& j, RunningEpisode& e) {
  e.id = j.at("id");
  e.mode = static_cast<EpisodeMode>(j.at("mode").get<int>());
  e.actor_id = j.at("actor_id");
  e.rows = j.at("rows");
  e.expires = j.at("expires");
}
void to_json(json& j, const LearnerLease& l) {
  j = {{"id", l.id}, {"generation", l.generation}, {"expires", l.expires}, {"seen", l.seen}};
}
void from_json(const json& j, LearnerLease& l) {
  l.id = j.at("id");
  l.generation = j.at("generation");
  l.expires = j.at("expires");
  l.seen = j.at("seen");
}

// Moves `expires` to now + lease once a third of the lease has gone by: not every message is a write.
void Renew(int64_t& expires, absl::Time now, absl::Duration lease) {
  if (absl::FromUnixMicros(expires) < now + lease * 2 / 3) expires = absl::ToUnixMicros(now + lease);
}

// Notes that someone was here, exactly enough to tell when it has been away for `absent`.
void NoteSeen(int64_t& seen, absl::Time now, absl::Duration absent) {
  if (now - absl::FromUnixMicros(seen) >= absent / 3) seen = absl::ToUnixMicros(now);
}

int64_t MaxEpisodes(const config::v1::Experiment& experiment) {
  return experiment.learning().has_max_episodes() ? experiment.learning().max_episodes() : kNever;
}

bool Alternates(const config::v1::Experiment& experiment) {
  return experiment.learning().schedule() == Learning::ALTERNATE;
}

// Rounds of evaluation that belong to `finished` training episodes.
int64_t EvaluationRounds(const config::v1::Experiment& experiment, int64_t finished) {
  const int64_t every = experiment.evaluation().every_episodes();
  return every == 0 ? 0 : std::max<int64_t>(0, finished - experiment.collection().seed_episodes()) / every;
}

// Updates that belong to `finished` training episodes (ALTERNATE). Without seed episodes there is nothing to fit at first.
int64_t UpdatesOwed(const config::v1::Experiment& experiment, int64_t finished) {
  const int64_t seeds = experiment.collection().seed_episodes();
  const Learning& learning = experiment.learning();
  if (finished < seeds || finished == 0) return 0;
  int64_t initial = learning.has_initial_updates() ? learning.initial_updates() : learning.updates_per_episode();
  if (seeds == 0) initial = 0;
  return initial + (finished - seeds) * learning.updates_per_episode();
}

absl::Duration AbsentAfter(const config::v1::Experiment& experiment) {
  return absl::Seconds(experiment.replay().limiter().absent_seconds());
}

}  // namespace

// The value "run" in the store, as JSON (docs/replay_storage.md).
struct RunCoordinator::State {
  std::string run_id;
  std::string writer;  // a random word of each write: tells after a lost reply whether a write was ours
  std::string specification_hash;  // empty before the first episode
  int64_t next_episode = 1;
  int64_t started = 0;   // training episodes, random ones included
  int64_t finished = 0;  // of those
  int64_t rows = 0;
  int64_t seed_rows = -1;  // rows when the last seed episode finished; -1 before
  int64_t evaluation_round = 0;  // rounds handed out completely
  int64_t evaluation_next = 0;   // episodes handed out of the round after those
  int64_t updates_done = 0;
  int64_t actors_seen = 0;
  LearnerLease learner;
  std::vector<RunningEpisode> running;

  RunningEpisode* Find(int64_t id) {
    const auto it = std::find_if(running.begin(), running.end(), [&](const RunningEpisode& e) { return e.id == id; });
    return it == running.end() ? nullptr : &*it;
  }

  void NoteSeeding(int64_t seed_episodes) {
    if (finished >= seed_episodes && seed_rows < 0) seed_rows = rows;
  }

  void Finish(int64_t id, int64_t seed_episodes) {
    const auto it = std::find_if(running.begin(), running.end(), [&](const RunningEpisode& e) { return e.id == id; });
    if (it->mode != EpisodeMode::kEvaluate) ++finished;
    running.erase(it);
    NoteSeeding(seed_episodes);
  }

  // Abandoned episodes count as finished.
  void Expire(absl::Time now, int64_t seed_episodes) {
    std::vector<int64_t> expired;
    for (const RunningEpisode& e : running) {
      if (absl::FromUnixMicros(e.expires) <= now) expired.push_back(e.id);
    }
    for (const int64_t id : expired) Finish(id, seed_episodes);
  }

  static State New(absl::Time now, int64_t seed_episodes) {
    State state;
    state.run_id = RandomIdentity();
    state.actors_seen = state.learner.seen = absl::ToUnixMicros(now);
    state.NoteSeeding(seed_episodes);
    return state;
  }

  std::string Text() const {
    const json j = {{"run_id", run_id}, {"writer", writer}, {"specification_hash", specification_hash},
                    {"next_episode", next_episode}, {"started", started}, {"finished", finished}, {"rows", rows},
                    {"seed_rows", seed_rows}, {"evaluation_round", evaluation_round},
                    {"evaluation_next", evaluation_next}, {"updates_done", updates_done},
                    {"actors_seen", actors_seen}, {"learner", learner}, {"running", running}};
    return j.dump(-1, ' ', false, json::error_handler_t::replace);  // ids come from clients and need not be UTF-8
  }

  static absl::StatusOr<State> Parse(const std::string& text) {
    try {
      const json j = json::parse(text);
      State s;
      s.run_id = j.at("run_id");
      s.writer = j.at("writer");
      s.specification_hash = j.at("specification_hash");
      s.next_episode = j.at("next_episode");
      s.started = j.at("started");
      s.finished = j.at("finished");
      s.rows = j.at("rows");
      s.seed_rows = j.at("seed_rows");
      s.evaluation_round = j.at("evaluation_round");
      s.evaluation_next = j.at("evaluation_next");
      s.updates_done = j.at("updates_done");
      s.actors_seen = j.at("actors_seen");
      s.learner = j.at("learner");
      s.running = j.at("running").get<std::vector<RunningEpisode>>();
      return s;
    } catch (const json::exception& e) {
      return absl::DataLossError(absl::StrCat("damaged state of the run in the store (value 'run'): ", e.what()));
    }
  }
};

RunCoordinator::RunCoordinator(Store* store, config::v1::Experiment experiment)
    : store_(store), experiment_(std::move(experiment)), tasks_(TaskEnvironments(experiment_.environment())) {}

absl::Status RunCoordinator::Write(const VersionedValue& old, State& state) {
  state.writer = RandomIdentity();
  const std::string text = state.Text();
  const absl::Status status = store_->CompareAndSet(kValueName, old.version, text);
  if (!absl::IsUnavailable(status)) return status;
  // Perhaps it was written and only the answer was lost.
  const absl::StatusOr<VersionedValue> now = store_->Get(kValueName);
  return now.ok() && now->value == text ? absl::OkStatus() : status;
}

absl::Status RunCoordinator::Mutate(const std::function<absl::Status(State&, absl::Time)>& change) {
  const int64_t seeds = experiment_.collection().seed_episodes();
  absl::MutexLock lock(&mu_);
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    ASSIGN_OR_RETURN(const VersionedValue old, store_->Get(kValueName));
    ASSIGN_OR_RETURN(const absl::Time now, store_->Now());
    State state = State::New(now, seeds);
    if (old.version != 0) {
      ASSIGN_OR_RETURN(state, State::Parse(old.value));
    }
    const std::string before = state.Text();
    state.Expire(now, seeds);
    RETURN_IF_ERROR(change(state, now));
    if (state.Text() == before) return absl::OkStatus();
    const absl::Status status = Write(old, state);
    if (!absl::IsAborted(status)) return status;
    // Another replica came first: a short random pause lets one of us win.
    absl::SleepFor(absl::Microseconds(DeriveSeed(absl::GetCurrentTimeNanos(), state.writer) % (50 << std::min(attempt, 8))));
  }
  return absl::UnavailableError(absl::StrCat("state of the run: others changed it first ", kMaxAttempts, " times"));
}

bool RunCoordinator::HandedOutAll(const State& state) const {
  const int64_t max = MaxEpisodes(experiment_);
  return state.started >= max && EvaluationRounds(experiment_, max) <= state.evaluation_round;
}

bool RunCoordinator::Complete(const State& state) const {
  if (!HandedOutAll(state) || state.finished < state.started || !state.running.empty()) return false;
  if (Alternates(experiment_)) return state.updates_done >= UpdatesOwed(experiment_, state.finished);
  return state.updates_done >= std::floor(experiment_.replay().limiter().updates_per_row() * state.rows);
}

std::optional<EpisodeMode> RunCoordinator::NextMode(const State& state, absl::Time now) const {
  const int64_t seeds = experiment_.collection().seed_episodes(), max = MaxEpisodes(experiment_);
  if (state.started < std::min(seeds, max)) return EpisodeMode::kRandom;
  if (state.finished < seeds) return std::nullopt;
  if (Alternates(experiment_)) {
    if (!state.running.empty() || state.updates_done < UpdatesOwed(experiment_, state.finished)) return std::nullopt;
  }
  if (EvaluationRounds(experiment_, state.finished) > state.evaluation_round) return EpisodeMode::kEvaluate;
  if (state.started >= max) return std::nullopt;
  if (!Alternates(experiment_)) {
    const auto& limiter = experiment_.replay().limiter();
    const double least = limiter.updates_per_row() * (state.rows - state.seed_rows) - limiter.tolerance();
    const bool learner_absent = now - absl::FromUnixMicros(state.learner.seen) >= AbsentAfter(experiment_);
    if (state.updates_done < least && !learner_absent) return std::nullopt;
  }
  return experiment_.collection().random_actions() ? EpisodeMode::kRandom : EpisodeMode::kTrain;
}

int64_t RunCoordinator::UpdatesAllowed(const State& state, absl::Time now) const {
  if (Alternates(experiment_)) return UpdatesOwed(experiment_, state.finished);
  if (state.finished < experiment_.collection().seed_episodes() || state.rows == 0) return 0;
  const auto& limiter = experiment_.replay().limiter();
  const double target = limiter.updates_per_row() * state.rows;
  if (state.finished >= MaxEpisodes(experiment_)) return static_cast<int64_t>(target);
  if (now - absl::FromUnixMicros(state.actors_seen) >= AbsentAfter(experiment_)) return kNever;
  return static_cast<int64_t>(target + limiter.tolerance());
}

absl::StatusOr<std::optional<EpisodeAssignment>> RunCoordinator::BeginEpisode(const std::string& actor_id,
                                                                              uint64_t specification_hash) {
  if (actor_id.empty() || actor_id.size() > kMaxActorIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("actor_id has ", actor_id.size(), " bytes, expected 1 to ", kMaxActorIdBytes));
  }
  const std::string hash = absl::StrFormat("%016x", specification_hash);
  std::optional<EpisodeAssignment> result;
  RETURN_IF_ERROR(Mutate([&](State& state, absl::Time now) -> absl::Status {
    result.reset();
    if (!state.specification_hash.empty() && state.specification_hash != hash) {
      return absl::FailedPreconditionError(absl::StrCat("environment specification ", hash, " of actor ", actor_id,
                                                        " is not the run's, ", state.specification_hash));
    }
    if (HandedOutAll(state)) {
      result.emplace().run_id = state.run_id;
      result->run_complete = true;
      return absl::OkStatus();
    }
    const std::optional<EpisodeMode> mode = NextMode(state, now);
    if (!mode.has_value()) return absl::OkStatus();
    state.specification_hash = hash;
    state.actors_seen = absl::ToUnixMicros(now);
    EpisodeAssignment& episode = result.emplace();
    episode.run_id = state.run_id;
    episode.episode_id = state.next_episode++;
    episode.mode = *mode;
    const int64_t tasks = static_cast<int64_t>(tasks_.size());
    if (*mode == EpisodeMode::kEvaluate) {
      // Every round plays the same seeds, and none that was trained on.
      episode.seed = DeriveSeed(experiment_.seed(), "evaluation", state.evaluation_next / tasks);
      episode.task = tasks_[state.evaluation_next % tasks].task();
      if (++state.evaluation_next >= experiment_.evaluation().episodes() * tasks) {
        state.evaluation_next = 0;
        state.evaluation_round = EvaluationRounds(experiment_, state.finished);
      }
    } else {
      episode.task = tasks_[state.started % tasks].task();
      episode.seed = DeriveSeed(experiment_.seed(), "environment", state.started++);
    }
    const absl::Duration lease = absl::Seconds(experiment_.collection().lease_seconds());
    state.running.push_back({episode.episode_id, *mode, actor_id, 0, absl::ToUnixMicros(now + lease)});
    return absl::OkStatus();
  }));
  return result;
}

absl::Status RunCoordinator::RecordChunk(const ChunkInfo& info) {
  return Mutate([&](State& state, absl::Time now) {
    RunningEpisode* const episode = state.Find(info.key.episode_id);
    if (episode == nullptr) return absl::OkStatus();  // finished or abandoned: a repeat, or news that came too late
    NoteSeen(state.actors_seen, now, AbsentAfter(experiment_));
    const int64_t rows = std::max(episode->rows, info.key.first_row + info.rows);
    if (episode->mode != EpisodeMode::kEvaluate) state.rows += rows - episode->rows;
    episode->rows = rows;
    Renew(episode->expires, now, absl::Seconds(experiment_.collection().lease_seconds()));
    if (info.end != EpisodeEnd::kContinues) state.Finish(episode->id, experiment_.collection().seed_episodes());
    return absl::OkStatus();
  });
}

absl::Status RunCoordinator::RenewLeases(const std::vector<int64_t>& episode_ids) {
  return Mutate([&](State& state, absl::Time now) {
    for (const int64_t id : episode_ids) {
      RunningEpisode* const episode = state.Find(id);
      if (episode == nullptr) continue;
      Renew(episode->expires, now, absl::Seconds(experiment_.collection().lease_seconds()));
      NoteSeen(state.actors_seen, now, AbsentAfter(experiment_));
    }
    return absl::OkStatus();
  });
}

absl::StatusOr<int64_t> RunCoordinator::AcquireLearner(const std::string& learner_id) {
  if (learner_id.empty() || learner_id.size() > kMaxActorIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("learner_id has ", learner_id.size(), " bytes, expected 1 to ", kMaxActorIdBytes));
  }
  int64_t generation = 0;
  RETURN_IF_ERROR(Mutate([&](State& state, absl::Time now) -> absl::Status {
    LearnerLease& learner = state.learner;
    const absl::Time expires = absl::FromUnixMicros(learner.expires);
    const bool held = learner.generation > 0 && now < expires;
    if (held && learner.id != learner_id) {
      return absl::AlreadyExistsError(absl::StrCat("learner '", learner.id, "' holds the run for another ",
                                                   absl::FormatDuration(absl::Ceil(expires - now, absl::Seconds(1)))));
    }
    if (!held) ++learner.generation;
    learner.id = learner_id;
    learner.expires = absl::ToUnixMicros(now + absl::Seconds(kLearnerLeaseSeconds));
    learner.seen = absl::ToUnixMicros(now);
    generation = learner.generation;
    return absl::OkStatus();
  }));
  return generation;
}

// INVALID_ARGUMENT, or FAILED_PRECONDITION unless this is the learner's generation.
absl::Status RunCoordinator::NoteProgress(State& state, int64_t generation, int64_t updates_done) {
  if (updates_done < 0) return absl::InvalidArgumentError(absl::StrCat("updates_done is ", updates_done, ", expected at least 0"));
  const LearnerLease& learner = state.learner;
  if (generation < 1 || generation != learner.generation) {
    return absl::FailedPreconditionError(absl::StrCat("generation ", generation, " is not the learner's; generation ",
                                                      learner.generation, " (", learner.id, ") is"));
  }
  state.updates_done = updates_done;
  return absl::OkStatus();
}

absl::Status RunCoordinator::ReleaseLearner(int64_t generation, int64_t updates_done) {
  return Mutate([&](State& state, absl::Time) -> absl::Status {
    RETURN_IF_ERROR(NoteProgress(state, generation, updates_done));
    state.learner.expires = 0;
    return absl::OkStatus();
  });
}

absl::StatusOr<RunCoordinator::Grant> RunCoordinator::ReserveUpdates(int64_t generation, int64_t updates_done, int32_t wanted) {
  if (wanted < 0) return absl::InvalidArgumentError(absl::StrCat("updates_wanted is ", wanted, ", expected at least 0"));
  Grant grant;
  RETURN_IF_ERROR(Mutate([&](State& state, absl::Time now) -> absl::Status {
    if (absl::Status noted = NoteProgress(state, generation, updates_done); !noted.ok()) return noted;
    LearnerLease& learner = state.learner;
    Renew(learner.expires, now, absl::Seconds(kLearnerLeaseSeconds));
    NoteSeen(learner.seen, now, AbsentAfter(experiment_));
    grant = {};
    grant.run_complete = Complete(state);
    if (!grant.run_complete) {
      const int64_t room = std::max<int64_t>(0, UpdatesAllowed(state, now) - updates_done);
      grant.updates = static_cast<int32_t>(std::min<int64_t>(wanted, room));
    }
    return absl::OkStatus();
  }));
  return grant;
}

absl::StatusOr<RunProgress> RunCoordinator::Progress() {
  RunProgress progress;
  RETURN_IF_ERROR(Mutate([&](State& state, absl::Time) {
    progress = {};
    if (!state.specification_hash.empty()) {
      progress.run_id = state.run_id;
      std::ignore = absl::SimpleHexAtoi(state.specification_hash, &progress.specification_hash);
    }
    progress.rows_appended = state.rows;
    progress.episodes_started = state.started;
    progress.episodes_finished = state.finished;
    progress.updates_done = state.updates_done;
    return absl::OkStatus();
  }));
  return progress;
}

absl::Status ValidatePacing(const config::v1::Experiment& experiment) {
  if (Alternates(experiment)) {
    if (experiment.collection().seed_episodes() == 0 && experiment.learning().initial_updates() > 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "learning.initial_updates is ", experiment.learning().initial_updates(),
          ", expected 0 when collection.seed_episodes is 0: there would be nothing to learn from"));
    }
    return absl::OkStatus();
  }
  const auto& limiter = experiment.replay().limiter();
  if (!(limiter.updates_per_row() > 0) || !(limiter.tolerance() >= 1)) {
    return absl::InvalidArgumentError(absl::StrCat("replay.limiter: updates_per_row is ", limiter.updates_per_row(),
                                                   " and tolerance ", limiter.tolerance(),
                                                   ", expected above 0 and at least 1"));
  }
  // Rows arrive by the chunk, and an episode that has begun is played to its end.
  int64_t rows = experiment.replay().chunk_rows();
  std::string what = "a chunk (replay.chunk_rows)";
  for (const config::v1::Environment& task : TaskEnvironments(experiment.environment())) {
    const int64_t repeat = std::max(1, task.action_repeat());
    const int64_t episode = (task.time_limit() + repeat - 1) / repeat;  // 0: the task's own limit, not known here
    if (episode > rows) {
      rows = episode;
      what = "an episode (environment.time_limit / environment.action_repeat)";
    }
  }
  const double needed = limiter.updates_per_row() * static_cast<double>(rows) / 2;
  if (limiter.tolerance() < needed) {
    return absl::InvalidArgumentError(absl::StrCat("replay.limiter.tolerance is ", limiter.tolerance(), ", expected at least ",
                                                   std::ceil(needed), ": ", what, " has ", rows, " rows, and ",
                                                   limiter.updates_per_row(), " updates per row leave the band at once"));
  }
  return absl::OkStatus();
}

}  // namespace orrery
