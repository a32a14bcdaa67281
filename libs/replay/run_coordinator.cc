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
constexpr size_t kMaxRequestIdBytes = 64;
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// What an actor asked and was told: all that is needed to tell it again.
struct Request {
  std::string id;
  std::string task;
  uint64_t seed = 0;
  bool operator==(const Request&) const = default;
};

struct RunningEpisode {
  int64_t id = 0;
  EpisodeMode mode = EpisodeMode::kRandom;
  std::string actor_id;
  int64_t rows = 0;       // up to the highest row seen
  int64_t expires = 0;    // microseconds since 1970, by the store's clock
  std::optional<Request> request;  // until it has rows; none: it was asked for without an id
  bool operator==(const RunningEpisode&) const = default;
};

struct LearnerLease {
  std::string id;
  int64_t generation = 0;
  int64_t expires = 0;
  int64_t seen = 0;
  bool operator==(const LearnerLease&) const = default;
};

// Ids come from clients and need not be UTF-8.
std::string Dump(const json& j) { return j.dump(-1, ' ', false, json::error_handler_t::replace); }

void from_json(const json& j, Request& r) {
  r.id = j.at("id");
  r.task = j.at("task");
  r.seed = j.at("seed");
}
void from_json(const json& j, RunningEpisode& e) {
  e.id = j.at("id");
  e.mode = static_cast<EpisodeMode>(j.at("mode").get<int>());
  e.actor_id = j.at("actor_id");
  e.rows = j.at("rows");
  e.expires = j.at("expires");
  if (j.contains("request")) e.request = j.at("request").get<Request>();
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

// A lease is moved to now + lease once a third of it has gone by: not every message is a write.
absl::Time RenewalDue(int64_t expires, absl::Duration lease) { return absl::FromUnixMicros(expires) - lease * 2 / 3; }
void Renew(int64_t& expires, absl::Time now, absl::Duration lease) {
  if (RenewalDue(expires, lease) < now) expires = absl::ToUnixMicros(now + lease);
}

// That someone was here is noted exactly enough to tell when it has been away for `absent`.
absl::Time SeenDue(int64_t seen, absl::Duration absent) { return absl::FromUnixMicros(seen) + absent / 3; }
void NoteSeen(int64_t& seen, absl::Time now, absl::Duration absent) {
  if (SeenDue(seen, absent) <= now) seen = absl::ToUnixMicros(now);
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

absl::Duration EpisodeLease(const config::v1::Experiment& experiment) {
  return absl::Seconds(experiment.collection().lease_seconds());
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
  bool operator==(const State&) const = default;

  RunningEpisode* Find(int64_t id) {
    const auto it = std::find_if(running.begin(), running.end(), [&](const RunningEpisode& e) { return e.id == id; });
    return it == running.end() ? nullptr : &*it;
  }

  // The one that this actor was given for this question and has not begun to play.
  RunningEpisode* FindAsked(const std::string& actor_id, const std::string& request_id) {
    if (request_id.empty()) return nullptr;
    const auto it = std::find_if(running.begin(), running.end(), [&](const RunningEpisode& e) {
      return e.request.has_value() && e.request->id == request_id && e.actor_id == actor_id;
    });
    return it == running.end() ? nullptr : &*it;
  }

  void CountRows(RunningEpisode& episode, int64_t up_to) {
    if (up_to <= episode.rows) return;
    if (episode.mode != EpisodeMode::kEvaluate) rows += up_to - episode.rows;
    episode.rows = up_to;
    episode.request.reset();
  }

  // Drops the notes of episodes that are not running: such a one never runs again.
  void Apply(Notes& notes) {
    std::unordered_map<int64_t, int64_t> applied;
    for (RunningEpisode& episode : running) {
      auto note = notes.rows.extract(episode.id);
      if (note.empty()) continue;
      CountRows(episode, note.mapped());
      applied.insert(std::move(note));
    }
    notes.rows = std::move(applied);
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
                    {"actors_seen", actors_seen}, {"learner", learner}};
    std::string text = Dump(j);
    // With a thousand of these, making objects of them first would be most of the time of a write.
    text.back() = ',';
    absl::StrAppend(&text, "\"running\":[");
    const char* separator = "";
    for (const RunningEpisode& e : running) {
      absl::StrAppend(&text, separator, "{\"id\":", e.id, ",\"mode\":", static_cast<int>(e.mode),
                      ",\"actor_id\":", Dump(e.actor_id), ",\"rows\":", e.rows, ",\"expires\":", e.expires);
      if (e.request.has_value()) {
        absl::StrAppend(&text, ",\"request\":{\"id\":", Dump(e.request->id), ",\"task\":", Dump(e.request->task),
                        ",\"seed\":", e.request->seed, "}");
      }
      text += '}';
      separator = ",";
    }
    return absl::StrCat(text, "]}");
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

// A change that waits for its turn.
struct RunCoordinator::Call {
  const Change* change = nullptr;
  absl::Status status;
  bool done = false;
  absl::CondVar turn;  // it is done, or the first in the queue
};

void RunCoordinator::Notes::Add(int64_t episode_id, int64_t up_to, absl::Time by) {
  int64_t& noted = rows[episode_id];
  noted = std::max(noted, up_to);
  write_by = std::min(write_by, by);
}

bool RunCoordinator::Notes::Due(absl::Time now) const {
  return !rows.empty() && (now >= write_by || write_by - now > kRowsDelay);  // the latter when the clock was set back
}

bool RunCoordinator::Quiet::Has(int64_t episode_id, absl::Time now) const {
  const auto found = until.find(episode_id);
  return found != until.end() && now >= since && now < found->second;
}

RunCoordinator::RunCoordinator(Store* store, config::v1::Experiment experiment, Clock& clock)
    : store_(store),
      experiment_(std::move(experiment)),
      tasks_(TaskEnvironments(experiment_.environment())),
      clock_(clock),
      state_(std::make_unique<State>()) {}

RunCoordinator::~RunCoordinator() = default;

int RunCoordinator::waiting() const {
  absl::MutexLock lock(&mu_);
  return static_cast<int>(queue_.size());
}

bool RunCoordinator::Note(int64_t episode_id, int64_t rows) {
  absl::MutexLock lock(&mu_);
  const absl::Time now = clock_.Now();
  if (!quiet_.Has(episode_id, now)) return false;
  notes_.Add(episode_id, rows, now + kRowsDelay);
  return !notes_.Due(now);
}

bool RunCoordinator::Rest(const std::vector<int64_t>& episode_ids) const {
  absl::MutexLock lock(&mu_);
  const absl::Time now = clock_.Now();
  for (const int64_t id : episode_ids) {
    if (!quiet_.Has(id, now)) return false;
  }
  return !notes_.Due(now);
}

absl::Status RunCoordinator::Mutate(const Change& change) {
  Call call{.change = &change};
  absl::MutexLock lock(&mu_);
  queue_.push_back(&call);
  while (!call.done && queue_.front() != &call) call.turn.Wait(&mu_);
  if (!call.done) ServeQueue();
  return call.status;
}

void RunCoordinator::ServeQueue() {
  const std::vector<Call*> calls(queue_.begin(), queue_.end());
  Notes notes = std::exchange(notes_, {});
  mu_.Unlock();
  const absl::Status status = Commit(calls, notes);
  mu_.Lock();
  for (const auto& [episode_id, rows] : notes.rows) notes_.Add(episode_id, rows, notes.write_by);
  queue_.erase(queue_.begin(), queue_.begin() + static_cast<int64_t>(calls.size()));
  for (Call* const call : calls) {
    if (!status.ok()) call->status = status;
    call->done = true;
    call->turn.Signal();
  }
  if (!queue_.empty()) queue_.front()->turn.Signal();
}

absl::Status RunCoordinator::Commit(absl::Span<Call* const> calls, Notes& notes) {
  const int64_t seeds = experiment_.collection().seed_episodes();
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    const absl::Time local = clock_.Now();
    const ValueIdentity seen = known_;
    ASSIGN_OR_RETURN(const absl::Time now, Refresh());
    State state = *state_;
    state.Apply(notes);
    // Rows alone are no reason to write until they are due.
    const State before = notes.Due(local) ? *state_ : state;
    state.Expire(now, seeds);
    for (Call* const call : calls) call->status = (*call->change)(state, now);
    absl::Status status;
    const bool altered = state != before;
    if (altered) status = Write(std::move(state));
    if (status.ok()) {
      if (altered || notes.Due(local)) notes = {};
      if (known_ != seen) UpdateQuiet(local, now);
      return absl::OkStatus();
    }
    if (!absl::IsAborted(status)) return status;
    // Another replica came first: a short random pause lets one of us win.
    absl::SleepFor(absl::Microseconds(DeriveSeed(absl::GetCurrentTimeNanos(), RandomIdentity()) % (50 << std::min(attempt, 8))));
  }
  return absl::UnavailableError(absl::StrCat("state of the run: others changed it first ", kMaxAttempts, " times"));
}

absl::StatusOr<absl::Time> RunCoordinator::Refresh() {
  ASSIGN_OR_RETURN(const Store::TimedValue read, store_->GetUnlessKnown(kValueName, known_));
  if (!read.value.has_value()) return read.now;
  known_ = {};
  version_ = read.value->version;
  if (version_ == 0) {  // a run begins with its first write
    *state_ = State::New(read.now, experiment_.collection().seed_episodes());
  } else {
    ASSIGN_OR_RETURN(*state_, State::Parse(read.value->value));
    known_ = IdentityOf(*read.value);
  }
  return read.now;
}

absl::Status RunCoordinator::Write(State state) {
  state.writer = RandomIdentity();
  const std::string text = state.Text();
  const VersionedValue value{text, NextVersion(version_, text)};
  known_ = {};
  absl::Status status = store_->CompareAndSet(kValueName, version_, value.value);
  if (absl::IsUnavailable(status)) {
    // Perhaps it was written and only the answer was lost.
    const absl::StatusOr<VersionedValue> there = store_->Get(kValueName);
    if (there.ok() && there->value == value.value) status = absl::OkStatus();
  }
  RETURN_IF_ERROR(status);
  *state_ = std::move(state);
  version_ = value.version;
  known_ = IdentityOf(value);
  return absl::OkStatus();
}

void RunCoordinator::UpdateQuiet(absl::Time local, absl::Time now) {
  Quiet quiet{local, {}};
  const absl::Time seen_due = SeenDue(state_->actors_seen, AbsentAfter(experiment_));
  for (const RunningEpisode& episode : state_->running) {
    const absl::Time due = std::min(seen_due, RenewalDue(episode.expires, EpisodeLease(experiment_)));
    if (due > now) quiet.until.emplace(episode.id, local + (due - now));
  }
  absl::MutexLock lock(&mu_);
  std::swap(quiet_, quiet);
}

bool RunCoordinator::HandedOutAll(const State& state) const {
  const Learning& learning = experiment_.learning();
  if (learning.has_max_updates() && state.updates_done >= learning.max_updates()) return true;
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

EpisodeAssignment RunCoordinator::HandOut(State& state, EpisodeMode mode) const {
  EpisodeAssignment episode;
  episode.run_id = state.run_id;
  episode.episode_id = state.next_episode++;
  episode.mode = mode;
  const int64_t tasks = static_cast<int64_t>(tasks_.size());
  if (mode == EpisodeMode::kEvaluate) {
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
  return episode;
}

absl::StatusOr<std::optional<EpisodeAssignment>> RunCoordinator::BeginEpisode(const std::string& actor_id,
                                                                              uint64_t specification_hash,
                                                                              const std::string& request_id,
                                                                              const std::function<absl::Status()>& check) {
  if (actor_id.empty() || actor_id.size() > kMaxActorIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("actor_id has ", actor_id.size(), " bytes, expected 1 to ", kMaxActorIdBytes));
  }
  if (request_id.size() > kMaxRequestIdBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("request_id has ", request_id.size(), " bytes, expected at most ", kMaxRequestIdBytes));
  }
  const std::string hash = absl::StrFormat("%016x", specification_hash);
  std::optional<EpisodeAssignment> result;
  RETURN_IF_ERROR(Mutate([&](State& state, absl::Time now) -> absl::Status {
    result.reset();
    if (check) {
      const absl::Status checked = check();
      if (!checked.ok()) return checked;
    }
    if (!state.specification_hash.empty() && state.specification_hash != hash) {
      return absl::FailedPreconditionError(absl::StrCat("environment specification ", hash, " of actor ", actor_id,
                                                        " is not the run's, ", state.specification_hash));
    }
    if (RunningEpisode* const asked = state.FindAsked(actor_id, request_id); asked != nullptr) {
      Renew(asked->expires, now, EpisodeLease(experiment_));
      NoteSeen(state.actors_seen, now, AbsentAfter(experiment_));
      result = {state.run_id, asked->id, asked->mode, asked->request->task, asked->request->seed};
      return absl::OkStatus();
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
    result = HandOut(state, *mode);
    std::optional<Request> request;
    if (!request_id.empty()) request = {request_id, result->task, result->seed};
    const int64_t expires = absl::ToUnixMicros(now + EpisodeLease(experiment_));
    state.running.push_back({result->episode_id, *mode, actor_id, 0, expires, std::move(request)});
    return absl::OkStatus();
  }));
  return result;
}

absl::Status RunCoordinator::RecordChunk(const ChunkInfo& info) {
  const int64_t rows = info.key.first_row + info.rows;
  if (info.end == EpisodeEnd::kContinues && Note(info.key.episode_id, rows)) return absl::OkStatus();
  return Mutate([&](State& state, absl::Time now) {
    RunningEpisode* const episode = state.Find(info.key.episode_id);
    if (episode == nullptr) return absl::OkStatus();  // finished or abandoned: a repeat, or news that came too late
    NoteSeen(state.actors_seen, now, AbsentAfter(experiment_));
    state.CountRows(*episode, rows);
    Renew(episode->expires, now, EpisodeLease(experiment_));
    if (info.end != EpisodeEnd::kContinues) state.Finish(episode->id, experiment_.collection().seed_episodes());
    return absl::OkStatus();
  });
}

absl::Status RunCoordinator::WriteRows() {
  {
    absl::MutexLock lock(&mu_);
    if (notes_.rows.empty()) return absl::OkStatus();
    notes_.write_by = absl::InfinitePast();
  }
  return Mutate([](State&, absl::Time) { return absl::OkStatus(); });
}

absl::Status RunCoordinator::RenewLeases(const std::vector<int64_t>& episode_ids) {
  if (Rest(episode_ids)) return absl::OkStatus();
  return Mutate([&](State& state, absl::Time now) {
    for (const int64_t id : episode_ids) {
      RunningEpisode* const episode = state.Find(id);
      if (episode == nullptr) continue;
      Renew(episode->expires, now, EpisodeLease(experiment_));
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
    LearnerLease& learner = state.learner;
    if (generation == learner.generation && learner.expires == 0) {
      return absl::FailedPreconditionError(absl::StrCat("generation ", generation, " has released the run"));
    }
    if (absl::Status noted = NoteProgress(state, generation, updates_done); !noted.ok()) return noted;
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

absl::StatusOr<std::string> RunCoordinator::RunIdOf(Store& store) {
  ASSIGN_OR_RETURN(const VersionedValue value, store.Get(kValueName));
  if (value.version == 0) return std::string();
  ASSIGN_OR_RETURN(const State state, State::Parse(value.value));
  return state.run_id;
}

absl::Status RunCoordinator::WritePlayed(Store& store, const PlayedRun& run) {
  ASSIGN_OR_RETURN(const absl::Time now, store.Now());
  State state;
  state.run_id = run.run_id;
  state.writer = RandomIdentity();
  state.specification_hash = absl::StrFormat("%016x", run.specification_hash);
  state.next_episode = run.last_episode + 1;
  state.started = state.finished = run.training_episodes;
  state.rows = state.seed_rows = run.training_rows;
  state.actors_seen = state.learner.seen = absl::ToUnixMicros(now);
  return store.CompareAndSet(kValueName, 0, state.Text());
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
