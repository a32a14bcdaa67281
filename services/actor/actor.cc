#include "services/actor/actor.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "libs/base/log.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/client/status.h"
#include "libs/client/trace.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/chunk_text.h"
#include "libs/telemetry/call_trace.h"
#include "libs/telemetry/metrics.h"

namespace orrery {
namespace {

// Waits on replay are cut into slices of this length, so that Stop is noticed.
constexpr absl::Duration kSlice = absl::Milliseconds(800);
// While other episodes run, idle environments ask only briefly and seldom.
constexpr absl::Duration kBriefWait = absl::Milliseconds(200);
constexpr absl::Duration kBeginInterval = absl::Seconds(1);
constexpr absl::Duration kFinishTimeout = absl::Seconds(5);

// Whether the same call may succeed later. INTERNAL and UNKNOWN may: a device without memory, a proxy that lost its server.
bool IsTransient(const absl::Status& status) { return !status.ok() && !IsFinalError(status.code()); }

// DType has the numbers of common.v1.DataType.
void ToProto(const std::string& name, const Array& array, common::v1::NamedTensor* out) {
  out->set_name(name);
  common::v1::Tensor* tensor = out->mutable_tensor();
  tensor->set_data_type(static_cast<common::v1::DataType>(array.dtype));
  for (int64_t size : array.shape) tensor->add_shape(size);
  tensor->set_data(array.bytes);
}

// [-1, 1) with 24 random bits: the same on every machine, unlike std::uniform_real_distribution.
float UniformAction(std::mt19937_64& random) {
  return static_cast<float>(random() >> 40) * (2.0f / (1 << 24)) - 1.0f;
}

// Arrays of one field, one per row, as one array [rows, …].
Array Stack(const std::vector<const Array*>& rows) {
  Array all{rows[0]->dtype, rows[0]->shape, std::string()};
  all.shape.insert(all.shape.begin(), static_cast<int64_t>(rows.size()));
  all.bytes.reserve(rows.size() * rows[0]->bytes.size());
  for (const Array* row : rows) all.bytes += row->bytes;
  return all;
}

}  // namespace

std::vector<float> RandomAction(const ActionSpec& spec, std::mt19937_64& random) {
  std::vector<float> action(spec.size, 0.0f);
  if (spec.discrete) {
    action[random() % action.size()] = 1.0f;
  } else {
    for (float& value : action) value = UniformAction(random);
  }
  return action;
}

planner::v1::Slot MakeSlot(const ArrayMap& observation, const std::string& belief,
                           const std::vector<float>& previous_action, uint64_t seed) {
  planner::v1::Slot slot;
  for (const auto& [name, value] : observation) ToProto(name, value, slot.add_observations());
  if (!belief.empty()) {
    slot.set_belief(belief);
    slot.mutable_previous_action()->Add(previous_action.begin(), previous_action.end());
  }
  slot.set_seed(seed);
  return slot;
}

struct Actor::Metrics {
  explicit Metrics(prometheus::Registry& r)
      : registry(r),
        step_seconds(AddHistogram(r, "actor_env_step_seconds", "Seconds of one environment step with its action repeat",
                                  SecondsBuckets())),
        wait_seconds(AddHistogram(r, "actor_action_wait_seconds", "Seconds waited for one answer of the planner",
                                  SecondsBuckets())),
        unacknowledged(AddGauge(r, "actor_unacknowledged_bytes", "Bytes of chunks sent and not yet acknowledged")),
        append_blocked(AddCounter(r, "actor_append_blocked_seconds_total",
                                  "Seconds that chunks waited for room among those not yet acknowledged")) {}
  prometheus::Counter& Steps(const std::string& task) {
    return AddCounter(registry, "actor_env_steps_total", "Simulator steps, action repeat counted", {{"task", task}});
  }
  prometheus::Counter& Episodes(const std::string& task) {
    return AddCounter(registry, "actor_episodes_total", "Episodes played to their end", {{"task", task}});
  }
  prometheus::Counter& Failures(const std::string& task) {
    return AddCounter(registry, "actor_environment_failures_total", "Episodes that ended because the environment failed",
                      {{"task", task}});
  }
  prometheus::Gauge& Return(const std::string& task, EpisodeMode mode) {
    return AddGauge(registry, "actor_episode_return", "Return of the last episode",
                    {{"task", task}, {"mode", Name(mode)}});
  }
  prometheus::Registry& registry;
  prometheus::Histogram& step_seconds;
  prometheus::Histogram& wait_seconds;
  prometheus::Gauge& unacknowledged;
  prometheus::Counter& append_blocked;
};

Actor::Actor(ActorOptions options)
    : options_(std::move(options)),
      alternate_(options_.experiment.learning().schedule() == config::v1::Learning::ALTERNATE),
      planner_(planner::v1::PlannerService::NewStub(options_.planner)),
      replay_(std::make_unique<ReplayClient>(options_.replay, options_.experiment.name())),
      writer_(ReplayWriter::Create(
          options_.replay, options_.experiment.name(),
          {.max_unacknowledged_bytes = options_.experiment.collection().max_unacknowledged_bytes(),
           .heartbeat = absl::Seconds(std::max(1.0, options_.experiment.collection().lease_seconds() / 6.0))})),
      metrics_(std::make_unique<Metrics>(*options_.registry)),
      players_(options_.experiment.collection().environments()) {}

Actor::~Actor() = default;

absl::StatusOr<std::unique_ptr<Actor>> Actor::Create(ActorOptions options) {
  std::unique_ptr<Actor> actor(new Actor(std::move(options)));
  ASSIGN_OR_RETURN(actor->tasks_,
                   TaskOptions(actor->options_.experiment.environment(), actor->options_.make_environment));
  for (const EnvironmentOptions& task : actor->tasks_) {  // so that counters begin at 0
    actor->metrics_->Steps(task.task);
    actor->metrics_->Episodes(task.task);
    actor->metrics_->Failures(task.task);
  }
  VectorEnvironment::Options environments;
  environments.size = static_cast<int>(actor->players_.size());
  environments.environment = actor->tasks_[0];
  environments.make = actor->options_.make_environment;
  environments.timeout = actor->options_.environment_timeout;
  ASSIGN_OR_RETURN(actor->environments_, VectorEnvironment::Create(std::move(environments)));
  actor->spec_ = actor->environments_->spec();
  actor->specification_hash_ = Hash(actor->spec_);
  for (size_t i = 0; i < actor->players_.size(); ++i) actor->players_[i].index = static_cast<int>(i);
  return actor;
}

absl::StatusOr<const EnvironmentOptions*> Actor::FindTask(const std::string& name) const {
  for (const EnvironmentOptions& task : tasks_) {
    if (task.task == name) return &task;
  }
  return absl::FailedPreconditionError(absl::StrFormat("replay hands out task '%s', which is not in the configuration", name));
}

bool Actor::Stopped() const {
  absl::MutexLock lock(&mu_);
  return stopped_;
}

void Actor::Stop() {
  absl::MutexLock lock(&mu_);
  stopped_ = true;
  stop_changed_.SignalAll();
  environments_->Interrupt();
  if (act_in_flight_ != nullptr) act_in_flight_->TryCancel();
}

void Actor::Pause(absl::Duration duration) {
  const absl::Time until = absl::Now() + duration;
  absl::MutexLock lock(&mu_);
  while (!stopped_ && !stop_changed_.WaitWithDeadline(&mu_, until)) {
  }
}

int Actor::Running() const {
  return static_cast<int>(std::count_if(players_.begin(), players_.end(), [](const Player& p) { return p.running; }));
}

absl::Status Actor::Run() {
  absl::StatusOr<bool> more = true;
  while (more.ok() && *more) more = Step();
  Finish();
  return more.status();
}

absl::StatusOr<bool> Actor::Step() {
  if (Stopped()) return false;
  ASSIGN_OR_RETURN(const bool more, BeginEpisodes());
  if (!more) return false;
  RETURN_IF_ERROR(Collect());
  ASSIGN_OR_RETURN(std::vector<Decision> decisions, Decide());
  for (size_t i = 0; i < players_.size(); ++i) {
    if (!decisions[i].action.empty()) RETURN_IF_ERROR(Execute(players_[i], std::move(decisions[i])));
  }
  RETURN_IF_ERROR(Collect());
  metrics_->unacknowledged.Set(static_cast<double>(writer_->unacknowledged_bytes()));
  return true;
}

void Actor::Finish() {
  const absl::Time deadline = absl::Now() + kFinishTimeout;
  for (Player& player : players_) {
    if (!player.running) continue;
    player.running = false;
    if (player.rows.empty()) continue;  // it has not started
    const TraceScope trace(player.trace);
    // No return to report: it was not played to its end.
    const absl::Status status = SendRows(player, EpisodeEnd::kTruncated);
    if (!status.ok()) LogWarning("episode cut short could not be sent: {}", status.ToString());
  }
  RenewLeases();
  FlushBefore(deadline);
  metrics_->unacknowledged.Set(static_cast<double>(writer_->unacknowledged_bytes()));
}

absl::StatusOr<bool> Actor::BeginEpisodes() {
  bool begun = false;
  for (Player& player : players_) {
    if (complete_ || Stopped()) break;
    if (player.running || environments_->busy(player.index)) continue;
    const int running = Running();
    if (running > 0) {
      // Planned episodes of ALTERNATE run alone.
      const bool alone = alternate_ && std::any_of(players_.begin(), players_.end(), [](const Player& p) {
                           return p.running && p.assignment.mode != EpisodeMode::kRandom;
                         });
      if (alone || absl::Now() < next_begin_) break;
    }
    player.trace = NewTrace();
    const TraceScope trace(player.trace);
    auto episode = replay_->BeginEpisode(options_.actor_id, specification_hash_,
                                         absl::Now() + (running > 0 ? kBriefWait : kSlice));
    if (!episode.ok() && !IsTransient(episode.status())) return Annotate(episode.status(), "beginning an episode");
    if (!episode.ok()) {
      if (!replay_away_) LogWarning("replay is away, trying again: {}", episode.status().ToString());
      replay_away_ = true;
      next_begin_ = absl::Now() + kBeginInterval;
      if (running == 0) Pause(replay_backoff_.Next());
      break;
    }
    if (replay_away_) LogInfo("replay is back");
    replay_away_ = false;
    replay_backoff_.Reset();
    if (!episode->has_value()) {
      next_begin_ = absl::Now() + kBeginInterval;
      break;
    }
    if ((*episode)->assignment.run_complete) {
      complete_ = true;
      break;
    }
    RETURN_IF_ERROR(Begin(player, **episode));
    begun |= player.running;
  }
  if (begun) RenewLeases();
  return !complete_ || Running() > 0;
}

absl::Status Actor::Begin(Player& player, const ReplayClient::Episode& episode) {
  ASSIGN_OR_RETURN(player.options, FindTask(episode.assignment.task));
  player.assignment = episode.assignment;
  player.begin = absl::Now();
  player.random.seed(DeriveSeed(episode.assignment.seed, "random_actions"));
  player.belief.clear();
  player.previous_action.clear();
  player.decisions = 0;
  player.episode_return = 0;
  player.failed_rows = 0;
  player.rows.clear();
  player.actions.clear();
  player.first_row = 0;
  player.version = player.pinned = {};
  RETURN_IF_ERROR(environments_->Reset(player.index, *player.options, episode.assignment.seed));
  player.running = true;
  return absl::OkStatus();
}

absl::Status Actor::Collect() {
  if (Stopped()) return absl::OkStatus();  // Stop interrupts one Take only
  bool waits = false, can_act = false;
  for (const Player& player : players_) {
    if (!Waits(player)) continue;
    waits = true;
    can_act |= player.assignment.mode == EpisodeMode::kRandom || absl::Now() >= next_act_;
  }
  const absl::Duration patience = alternate_ ? absl::InfiniteDuration() : options_.patience;
  absl::Time deadline = waits && !can_act ? next_act_ : absl::InfiniteFuture();
  const bool idle = std::any_of(players_.begin(), players_.end(),
                                [&](const Player& p) { return !p.running && !environments_->busy(p.index); });
  // Those that nothing was begun in ask again meanwhile.
  if (idle && !complete_ && !alternate_) deadline = std::min(deadline, absl::Now() + kBeginInterval);
  for (VectorResult& result : environments_->Take(patience, /*at_least=*/can_act ? 0 : 1, deadline)) {
    Player& player = players_[result.index];
    if (!player.running) continue;  // Finish has ended the episode
    const TraceScope trace(player.trace);
    if (!player.rows.empty()) metrics_->step_seconds.Observe(absl::ToDoubleSeconds(result.duration));
    RETURN_IF_ERROR(Advance(player, std::move(result.step)));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<Actor::Decision>> Actor::Decide() {
  std::vector<Decision> decisions(players_.size());
  std::map<SnapshotVersion, std::vector<size_t>> planned;  // by the snapshot to plan with
  int planning = 0;
  for (size_t i = 0; i < players_.size(); ++i) {
    if (!Waits(players_[i])) continue;
    if (players_[i].assignment.mode == EpisodeMode::kRandom) {
      decisions[i].action = RandomAction(spec_.action, players_[i].random);
    } else {
      planned[players_[i].pinned].push_back(i);
      planning += 1;
    }
  }
  if (planned.empty()) return decisions;
  if (const absl::Duration wait = next_act_ - absl::Now(); wait > absl::ZeroDuration()) {
    if (planning < Running()) return decisions;  // random episodes go on meanwhile
    Pause(wait);
  }
  for (const auto& [snapshot, players] : planned) {
    ASSIGN_OR_RETURN(const bool answered, DecideTogether(players, decisions));
    if (!answered) break;
  }
  return decisions;
}

absl::StatusOr<bool> Actor::DecideTogether(const std::vector<size_t>& players, std::vector<Decision>& decisions) {
  std::vector<Player*> planned;
  for (const size_t i : players) planned.push_back(&players_[i]);
  planner::v1::ActResponse response;
  ASSIGN_OR_RETURN(const bool answered, Act(planned, response));
  if (!answered) return false;
  const SnapshotVersion version{response.snapshot_version().generation(), response.snapshot_version().counter()};
  for (size_t k = 0; k < planned.size(); ++k) {
    planner::v1::SlotResult& result = *response.mutable_results(static_cast<int>(k));
    decisions[players[k]] = {{result.action().begin(), result.action().end()}, version};
    planned[k]->belief = std::move(*result.mutable_belief());
    if (planned[k]->assignment.mode == EpisodeMode::kEvaluate) planned[k]->pinned = version;
  }
  return true;
}

void Actor::SendTraces(const std::vector<Player*>& planned, grpc::ClientContext& context) {
  SendTrace(context);
  std::string others;
  for (size_t i = 1; i < std::min(planned.size(), kMaxTraceLinks + 1); ++i) {
    absl::StrAppend(&others, others.empty() ? "" : ",", planned[i]->trace.trace_id());
  }
  if (!others.empty()) context.AddMetadata(kTraceLinksKey, others);
}

absl::Status Actor::ActOnce(const std::vector<Player*>& planned, planner::v1::ActResponse& response) {
  planner::v1::ActRequest request;
  request.set_client_id(options_.actor_id);
  request.set_model(options_.model);
  request.set_priority(planner::v1::EXPLORATION);
  if (const SnapshotVersion pinned = planned[0]->pinned; pinned != SnapshotVersion{}) {
    request.mutable_snapshot_version()->set_generation(pinned.generation);
    request.mutable_snapshot_version()->set_counter(pinned.counter);
  }
  for (const Player* player : planned) {
    const uint64_t seed = DeriveSeed(player->assignment.seed, "act", static_cast<uint64_t>(player->decisions));
    planner::v1::Slot& slot = *request.add_slots();
    slot = MakeSlot(player->rows.back().observation, player->belief, player->previous_action, seed);
    if (player->assignment.mode == EpisodeMode::kTrain) {
      slot.set_exploration_noise(options_.experiment.collection().exploration_noise());
    } else {
      request.set_priority(planner::v1::EVALUATION);
    }
  }
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options_.act_timeout));
  SendTraces(planned, context);
  {
    absl::MutexLock lock(&mu_);
    if (stopped_) return absl::CancelledError("stopped");
    act_in_flight_ = &context;
  }
  const absl::Time begin = absl::Now();
  const absl::Status status = FromGrpc(planner_->Act(&context, request, &response));
  metrics_->wait_seconds.Observe(absl::ToDoubleSeconds(absl::Now() - begin));
  absl::MutexLock lock(&mu_);
  act_in_flight_ = nullptr;
  return status;
}

void Actor::NotePlannerAway(const absl::Status& status) {
  const absl::Time now = absl::Now();
  planner_away_since_ = std::min(planner_away_since_, now);
  next_act_ = now + planner_backoff_.Next();
  // A full queue has room again after a batch or two: under load that is no news, unless it stays full for so long.
  if (absl::IsResourceExhausted(status) && now - planner_away_since_ < options_.act_timeout) return;
  if (Stopped() || std::exchange(planner_away_told_, true)) return;
  LogWarning("the planner does not answer, trying again: {}", status.ToString());
}

absl::StatusOr<bool> Actor::Act(const std::vector<Player*>& planned, planner::v1::ActResponse& response) {
  const TraceScope trace(planned[0]->trace);
  absl::Status status = ActOnce(planned, response);
  const bool has_belief =
      std::any_of(planned.begin(), planned.end(), [](const Player* p) { return !p->belief.empty(); });
  if (has_belief && (absl::IsFailedPrecondition(status) || absl::IsInvalidArgument(status))) {
    // A model of another structure has taken over: begin new beliefs in the middle of the episodes.
    LogWarning("the planner refused a belief, beginning new ones: {}", status.ToString());
    for (Player* player : planned) player->belief.clear();
    response.Clear();
    status = ActOnce(planned, response);
  }
  if (!status.ok()) {
    if (!IsTransient(status)) return Annotate(status, "asking the planner");
    NotePlannerAway(status);
    return false;
  }
  if (std::exchange(planner_away_told_, false)) LogInfo("the planner answers again");
  planner_away_since_ = absl::InfiniteFuture();
  planner_backoff_.Reset();
  if (response.results_size() != static_cast<int>(planned.size())) {
    return absl::DataLossError(absl::StrFormat("the planner answered %d slots, expected %d", response.results_size(),
                                               static_cast<int>(planned.size())));
  }
  for (const planner::v1::SlotResult& result : response.results()) {
    if (result.action_size() != spec_.action.size) {
      return absl::FailedPreconditionError(absl::StrFormat("the planner answered with an action of %d numbers, expected %d",
                                                           result.action_size(), spec_.action.size));
    }
  }
  return true;
}

absl::Status Actor::Execute(Player& player, Decision decision) {
  const TraceScope trace(player.trace);
  const absl::Status begun = environments_->Step(player.index, decision.action);
  if (!begun.ok()) return Fail(player, begun);
  player.decision = std::move(decision);
  return absl::OkStatus();
}

absl::Status Actor::Advance(Player& player, absl::StatusOr<TimeStep> step) {
  if (!step.ok()) return Fail(player, step.status());
  TimeStep next = *std::move(step);
  if (player.rows.empty()) {
    player.rows.push_back(std::move(next));
    player.actions.emplace_back(spec_.action.size, 0.0f);
    return absl::OkStatus();
  }
  metrics_->Steps(player.options->task).Increment(player.options->action_repeat);
  if (static_cast<int>(player.rows.size()) >= options_.experiment.replay().chunk_rows()) {
    RETURN_IF_ERROR(SendRows(player, EpisodeEnd::kContinues));
    if (!player.running) return absl::OkStatus();  // refused by replay
  }
  player.decisions += 1;
  player.episode_return += next.reward;
  player.version = std::max(player.version, player.decision.version);
  player.previous_action = player.decision.action;
  const bool terminal = next.is_terminal;
  const bool failed = HasFailed(player, next.reward);
  const bool last = next.is_last || terminal || failed;
  player.rows.push_back(std::move(next));
  player.actions.push_back(std::move(player.decision.action));
  if (!last) return absl::OkStatus();
  RETURN_IF_ERROR(End(player, terminal ? EpisodeEnd::kTerminated : EpisodeEnd::kTruncated));
  // The next episode of ALTERNATE depends on this one: everything must be in the store before it is asked for.
  if (alternate_) FlushBefore(absl::InfiniteFuture());
  return absl::OkStatus();
}

bool Actor::HasFailed(Player& player, double reward) const {
  const config::v1::Collection& collection = options_.experiment.collection();
  if (!collection.has_early_end() || player.assignment.mode == EpisodeMode::kEvaluate) return false;
  if (reward < collection.early_end().reward_below()) player.failed_rows += 1;
  return player.failed_rows >= collection.early_end().failed_rows();
}

absl::Status Actor::SendRows(Player& player, EpisodeEnd end) {
  const size_t n = player.rows.size();
  ArrayMap fields;
  std::vector<const Array*> column(n);
  for (const TensorSpec& modality : spec_.observations) {
    for (size_t i = 0; i < n; ++i) column[i] = &player.rows[i].observation.at(modality.name);  // checked by CheckStep
    fields[modality.name] = Stack(column);
  }
  std::vector<float> actions, rewards;
  std::vector<uint8_t> is_first, is_terminal;
  Chunk chunk;
  for (size_t i = 0; i < n; ++i) {
    actions.insert(actions.end(), player.actions[i].begin(), player.actions[i].end());
    rewards.push_back(static_cast<float>(player.rows[i].reward));
    chunk.info.reward_sum += player.rows[i].reward;
    is_first.push_back(player.first_row == 0 && i == 0);
    is_terminal.push_back(player.rows[i].is_terminal);
  }
  const int64_t rows = static_cast<int64_t>(n);
  fields[kAction] = Array::From<float>(actions, {rows, spec_.action.size});
  fields[kReward] = Array::From<float>(rewards, {rows});
  fields[kIsFirst] = Array::From<uint8_t>(is_first, {rows});
  fields[kIsTerminal] = Array::From<uint8_t>(is_terminal, {rows});
  ASSIGN_OR_RETURN(chunk.payload, EncodeRows(fields));
  chunk.run_id = player.assignment.run_id;
  chunk.info.key = {player.assignment.episode_id, player.first_row};
  chunk.info.rows = static_cast<int32_t>(n);
  chunk.info.mode = player.assignment.mode;
  chunk.info.end = end;
  chunk.info.specification_hash = specification_hash_;
  chunk.info.task = static_cast<int32_t>(player.options - tasks_.data());
  chunk.info.snapshot_version = player.version;
  chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
  player.rows.clear();
  player.actions.clear();
  player.first_row += rows;
  player.version = {};
  absl::Status status = writer_->Append(chunk, absl::InfinitePast());
  // After Stop a full queue gets one more slice, then the rows are given up.
  for (bool full = absl::IsDeadlineExceeded(status); full; full = absl::IsDeadlineExceeded(status) && !Stopped()) {
    const absl::Time begin = absl::Now();
    status = writer_->Append(chunk, begin + kSlice);
    metrics_->append_blocked.Increment(absl::ToDoubleSeconds(absl::Now() - begin));
  }
  if (!status.ok()) Drop(player, status);
  return absl::OkStatus();
}

absl::Status Actor::End(Player& player, EpisodeEnd end) {
  RETURN_IF_ERROR(SendRows(player, end));
  if (!player.running) return absl::OkStatus();  // refused by replay
  player.running = false;
  failures_ = 0;
  RenewLeases();
  EpisodeSummary summary;
  summary.episode_id = player.assignment.episode_id;
  summary.mode = player.assignment.mode;
  summary.end = end;
  summary.task = player.options->task;
  summary.episode_return = player.episode_return;
  summary.rows = player.decisions + 1;
  summary.environment_steps = player.decisions * player.options->action_repeat;
  summary.seconds = absl::ToDoubleSeconds(absl::Now() - player.begin);
  metrics_->Episodes(summary.task).Increment();
  metrics_->Return(summary.task, summary.mode).Set(summary.episode_return);
  if (options_.on_episode) options_.on_episode(summary);
  return absl::OkStatus();
}

void Actor::Drop(Player& player, const absl::Status& why) {
  LogWarning("episode dropped episode={} rows={}: {}", player.assignment.episode_id, player.decisions + 1,
             why.ToString());
  player.running = false;
  RenewLeases();
}

absl::Status Actor::Fail(Player& player, const absl::Status& why) {
  const std::string what = absl::StrFormat("task '%s' failed in episode %d after %d decisions", player.options->task,
                                           player.assignment.episode_id, player.decisions);
  LogWarning("{}: {}", what, why.ToString());
  metrics_->Failures(player.options->task).Increment();
  // One that failed at its start has no row; its lease runs out.
  if (!player.rows.empty()) RETURN_IF_ERROR(SendRows(player, EpisodeEnd::kTruncated));
  player.running = false;
  RenewLeases();
  if (++failures_ < kMaxFailures) return absl::OkStatus();
  return Annotate(why, absl::StrFormat("%s, the %dth episode in a row", what, failures_));
}

void Actor::FlushBefore(absl::Time deadline) {
  absl::Status status;
  do {
    status = writer_->Flush(std::min(deadline, absl::Now() + kSlice));
  } while (absl::IsDeadlineExceeded(status) && absl::Now() < deadline &&
           (deadline != absl::InfiniteFuture() || !Stopped()));
  if (!status.ok() && !Stopped()) LogWarning("rows are not acknowledged: {}", status.ToString());
}

void Actor::RenewLeases() {
  std::vector<int64_t> ids;
  for (const Player& player : players_) {
    if (player.running) ids.push_back(player.assignment.episode_id);
  }
  writer_->KeepAlive(std::move(ids));
}

}  // namespace orrery
