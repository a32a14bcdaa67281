#include "libs/learning/learner.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/telemetry/metrics.h"
#include "libs/world_model/parallel_rows.h"

namespace orrery {
namespace {

constexpr int kConcurrentBlock = 10;
constexpr absl::Duration kCall = absl::Seconds(5);          // deadline of a call to replay
constexpr absl::Duration kSlice = absl::Milliseconds(500);  // waits look up this often for Stop and the lease
constexpr absl::Duration kRelease = absl::Seconds(1);
constexpr absl::Duration kReportEvery = absl::Seconds(5);   // well below the lease of 30 s
constexpr absl::Duration kStatsEvery = absl::Seconds(10);
constexpr absl::Duration kPatience = absl::Seconds(5);      // for rows that the watch does not bring
constexpr absl::Duration kOutageLogEvery = absl::Seconds(30);
constexpr absl::Duration kTellEvery = absl::Seconds(1);      // below the limit of a group
constexpr absl::Duration kFollowAfterStop = absl::Seconds(10);

}  // namespace

Learner::Metrics::Metrics(prometheus::Registry& r)
    : registry(r),
      updates(AddCounter(r, "learner_updates_total", "Updates made")),
      skipped_updates(AddCounter(r, "learner_skipped_updates_total", "Updates skipped because they were not finite")),
      checkpoint_errors(AddCounter(r, "learner_checkpoint_errors_total", "Checkpoints that could not be written")),
      put_errors(AddCounter(r, "learner_snapshot_put_errors_total", "Snapshots that replay could not keep")),
      refused_chunks(AddCounter(r, "learner_chunks_refused_total", "Chunks that are damaged or do not fit the model")),
      update_seconds(AddHistogram(r, "learner_update_seconds", "Time of one update", SecondsBuckets())),
      batch_wait_seconds(AddHistogram(r, "learner_batch_wait_seconds", "Time to get a batch", SecondsBuckets())),
      publish_seconds(
          AddHistogram(r, "learner_snapshot_publish_seconds", "Time to serialise and publish a snapshot", SecondsBuckets())),
      gradient_norm(AddGauge(r, "learner_gradient_norm", "Global norm of the last gradient, before clipping")),
      learning_rate(AddGauge(r, "learner_learning_rate", "Learning rate of the model's last update")),
      updates_per_env_step(AddGauge(r, "learner_updates_per_env_step", "Updates made per environment step acknowledged")),
      snapshot_version(AddGauge(r, "learner_snapshot_version", "Updates behind the newest published snapshot")) {}

absl::StatusOr<std::unique_ptr<Learner>> Learner::Create(Options options) {
  if (options.replay == nullptr || options.watcher == nullptr || options.publisher == nullptr ||
      options.registry == nullptr) {
    return absl::InvalidArgumentError("a learner needs a replay client, a watcher, a publisher and a registry");
  }
  RETURN_IF_ERROR(Validate(options.experiment));
  auto learner = std::unique_ptr<Learner>(new Learner(std::move(options)));
  RETURN_IF_ERROR(learner->Initialize());
  return learner;
}

Learner::Learner(Options options) : options_(std::move(options)), metrics_(*options_.registry) {}

Learner::~Learner() = default;

absl::Status Learner::Initialize() {
  const config::v1::Experiment& experiment = options_.experiment;
  const config::v1::Learning& learning = experiment.learning();
  Mirror::Options mirror;
  mirror.model = experiment.model();
  mirror.sequence_length = learning.sequence_length();
  mirror.max_rows = experiment.replay().max_rows();
  mirror.max_bytes = learning.mirror_bytes();
  mirror.clock = options_.clock;
  mirror.refused_chunks = &metrics_.refused_chunks;
  ASSIGN_OR_RETURN(mirror_, Mirror::Create(mirror));
  const auto seed = static_cast<uint64_t>(experiment.seed());
  ASSIGN_OR_RETURN(trainer_, Trainer::Create(experiment.model(), learning, seed, options_.device, options_.threads,
                                             /*bfloat16=*/false, options_.group));
  BatchPart part;
  if (options_.group != nullptr) part = {options_.group->rank(), options_.group->size()};
  if (learning.batch_size() % part.ranks != 0) {
    return absl::InvalidArgumentError(absl::StrCat("learning.batch_size ", learning.batch_size(), " cannot be shared by ",
                                                   part.ranks, " ranks: expected a multiple of them"));
  }
  source_ = std::make_unique<MirroredSource>(mirror_.get(), learning.batch_size(), DeriveSeed(seed, "batches"),
                                             options_.device, part);
  CheckpointKeeper::Options checkpoints;
  if (leads()) checkpoints.folder = options_.checkpoint_dir;
  checkpoints.keep = learning.keep_checkpoints();
  checkpoints.every_updates = learning.checkpoint_every_updates();
  checkpoints.errors = &metrics_.checkpoint_errors;
  ASSIGN_OR_RETURN(checkpoints_, CheckpointKeeper::Open(std::move(checkpoints)));
  if (!leads()) return absl::OkStatus();
  Publication::Options publication;
  publication.experiment = experiment;
  publication.replay = options_.replay;
  publication.on_snapshot = options_.on_snapshot;
  publication.publisher = options_.publisher;
  publication.version = &metrics_.snapshot_version;
  publication.seconds = &metrics_.publish_seconds;
  publication.put_errors = &metrics_.put_errors;
  publication.clock = options_.clock;
  publication_ = std::make_unique<Publication>(std::move(publication));
  return Resume();
}

absl::Status Learner::Resume() {
  ASSIGN_OR_RETURN(const std::optional<Checkpoint> checkpoint,
                   checkpoints_->ToResume(options_.experiment.name(), options_.resume));
  if (!checkpoint.has_value()) return absl::OkStatus();
  RETURN_IF_ERROR(Annotate(trainer_->Restore(checkpoint->tensors, /*with_random=*/true), options_.checkpoint_dir));
  RETURN_IF_ERROR(source_->SetState(checkpoint->sampler));
  if (updates_ != checkpoint->updates) {
    LogInfo("resumed from a checkpoint updates={} folder={}", checkpoint->updates, options_.checkpoint_dir);
  }
  published_updates_ = updates_ = checkpoint->updates;
  absl::MutexLock lock(&mu_);
  progress_.updates = updates_;
  return absl::OkStatus();
}

absl::Status Learner::Run() {
  UseTorchThreads();
  if (!leads()) return Follow();
  RETURN_IF_ERROR(Acquire());
  // Another learner may have gone on, and written checkpoints, while this one waited to become the learner.
  absl::Status status = stopped() ? absl::OkStatus() : Resume();
  if (status.ok() && !stopped()) status = Lead();
  // Those that are left to end the run orderly.
  const absl::Status told = status.ok() ? Tell(Order::kStop, stopped() ? 1 : 0) : absl::OkStatus();
  // Who comes after a group that failed need not wait until the lease has run out.
  if (status.ok() || (options_.group != nullptr && absl::IsUnavailable(status))) Release();
  if (!told.ok()) LogWarning("not every rank knows that the run has ended reason={}", told.ToString());
  return status;
}

absl::Status Learner::Lead() {
  RETURN_IF_ERROR(GiveState(/*with_random=*/true));
  Publish(/*always_keep=*/true);
  const auto stop = [this] { return stopped(); };
  // The first generation has none that were here before.
  if (generation_ > 1) publication_->AwaitAPlanner(options_.planner_patience, stop);
  publication_->AwaitPlanners(stop);
  mirror_->Follow(std::move(options_.watcher));
  absl::StatusOr<bool> more = true;
  if (options_.wait_for_all_rows) {
    if (const absl::Status rows = AwaitRows(); !rows.ok()) more = rows;
  }
  while (more.ok() && *more) more = Step();
  mirror_->Stop();
  if (!more.ok() && !absl::IsCancelled(more.status())) {
    LogError("learning ended updates={} reason={}", updates_, more.status().ToString());
    return more.status();
  }
  // Under ALTERNATE a block that was cut short is not published: it is made good after a resume.
  if (!alternate()) Publish(/*always_keep=*/true);
  SaveCheckpoint();
  publication_->Flush();
  LogInfo("learner stopped updates={}", updates_);
  return absl::OkStatus();
}

absl::Status Learner::Acquire() {
  absl::Time last_log = absl::InfinitePast();
  while (!stopped()) {
    RETURN_IF_ERROR(KeepGroup());
    const absl::StatusOr<int64_t> generation =
        options_.replay->AcquireLearner(options_.learner_id, options_.clock->Now() + kCall);
    if (generation.ok()) {
      generation_ = *generation;
      last_report_ = options_.clock->Now();
      LogInfo("learner holds the run={} generation={} updates={}", options_.experiment.name(), generation_, updates_);
      return absl::OkStatus();
    }
    const absl::Status& status = generation.status();
    if (!absl::IsAlreadyExists(status) && IsFinalError(status.code())) {
      return Annotate(status, "cannot become the learner of this run");
    }
    if (options_.clock->Now() - last_log >= kOutageLogEvery) {
      LogWarning("waiting to become the learner run={} reason={}", options_.experiment.name(), status.ToString());
      last_log = options_.clock->Now();
    }
    WaitForStop(absl::Seconds(1));
  }
  return absl::OkStatus();
}

void Learner::Release() {
  if (generation_ == 0) return;  // stopped before it held the run
  const absl::Status released =
      options_.replay->ReleaseLearner(generation_, updates_to_report(), options_.clock->Now() + kRelease);
  if (!released.ok()) LogWarning("the lease was not given back, it ends by itself reason={}", released.ToString());
}

absl::StatusOr<bool> Learner::Step() {
  if (stopped()) return false;
  RETURN_IF_ERROR(KeepGroup());
  const config::v1::Learning& learning = options_.experiment.learning();
  // Under ALTERNATE nothing else happens meanwhile, so one block holds all that is owed.
  int64_t wanted = alternate() ? std::max({learning.updates_per_episode(), learning.initial_updates(), 1000})
                               : kConcurrentBlock;
  if (learning.has_max_updates()) wanted = std::min(wanted, learning.max_updates() - updates_);
  if (wanted <= 0) {
    LogInfo("learning.max_updates are made updates={}", updates_);
    return false;
  }
  const absl::StatusOr<RunCoordinator::Grant> grant =
      options_.replay->ReserveUpdates(generation_, updates_to_report(), static_cast<int32_t>(wanted),
                                      options_.clock->Now() + kCall);
  if (absl::IsFailedPrecondition(grant.status())) {
    return Annotate(grant.status(), "another learner took this run over");
  }
  if (!grant.ok()) {
    LogOutage("ReserveUpdates", grant.status());
    WaitForStop(kSlice);
    return true;
  }
  last_report_ = options_.clock->Now();
  if (grant->updates > 0) {
    if (alternate()) RETURN_IF_ERROR(AwaitRows());
    return MakeUpdates(grant->updates);
  }
  PublishIfDue();
  if (grant->run_complete) LogInfo("the run is complete updates={}", updates_);
  return !grant->run_complete;
}

absl::StatusOr<bool> Learner::MakeUpdates(int32_t count) {
  RETURN_IF_ERROR(AwaitGroup());
  for (int32_t i = 0; i < count; ++i) {
    // Under ALTERNATE the data are others after the block.
    RETURN_IF_ERROR(MakeUpdate(/*more=*/!alternate() || i + 1 < count));
    if (checkpoints_->Due(updates_)) SaveCheckpoint();
    PublishIfDue();
    RETURN_IF_ERROR(Heartbeat());
    if (stopped()) break;
  }
  RefreshRows();
  if (!alternate()) return true;
  if (stopped()) return false;
  // Once these updates are reported there will be other data, from which they could not be made again.
  if (checkpoints_->skipped_in_a_row() <= 1) SaveCheckpoint();  // one alone is no sign of bad parameters
  Publish(/*always_keep=*/true);
  publication_->AwaitPlanners([this] { return stopped(); });
  published_updates_ = updates_;
  return true;
}

absl::Status Learner::MakeUpdate(bool more) {
  const absl::Time begin = options_.clock->Now();
  ASSIGN_OR_RETURN(const StoredBatch batch, NextBatch());
  RETURN_IF_ERROR(Tell(Order::kUpdate, more ? 1 : 0));
  if (more) source_->Prefetch();
  const absl::Time have_batch = options_.clock->Now();
  UpdateReport report;
  ASSIGN_OR_RETURN(report.result, trainer_->Update(batch));
  report.updates = ++updates_;
  report.batch_wait_seconds = absl::ToDoubleSeconds(have_batch - begin);
  report.update_seconds = absl::ToDoubleSeconds(options_.clock->Now() - have_batch);
  report.rows_appended = rows_appended_;
  Observe(report);
  return checkpoints_->Count(report.result.skipped) ? RollBack() : absl::OkStatus();
}

void Learner::Observe(const UpdateReport& report) {
  const UpdateResult& result = report.result;
  metrics_.updates.Increment();
  metrics_.update_seconds.Observe(report.update_seconds);
  metrics_.batch_wait_seconds.Observe(report.batch_wait_seconds);
  if (result.skipped) {
    metrics_.skipped_updates.Increment();
    if (checkpoints_->skipped_in_a_row() == 0) {
      LogWarning("update skipped: loss or gradient is not finite updates={}", updates_);
    }
  } else {
    metrics_.gradient_norm.Set(result.gradient_norm);
    metrics_.learning_rate.Set(result.learning_rate);
    for (const auto& [term, loss] : result.losses) {
      prometheus::Gauge*& gauge = loss_gauges_[term];
      if (gauge == nullptr) {
        gauge = &AddGauge(metrics_.registry, "learner_loss", "Loss of the last update, by term", {{"term", term}});
      }
      gauge->Set(loss);
    }
  }
  {
    absl::MutexLock lock(&mu_);
    progress_.updates = updates_;
    const auto total = result.losses.find("total");
    if (!result.skipped && total != result.losses.end()) progress_.loss = total->second;
  }
  if (options_.on_update) options_.on_update(report);
}

absl::StatusOr<StoredBatch> Learner::NextBatch() {
  if (!leads()) {
    if (prepared_.has_value()) return *std::exchange(prepared_, std::nullopt);
    return source_->Next(options_.clock->Now() + options_.group->limit());  // rank 0 has one
  }
  absl::Time log_after = options_.clock->Now() + kPatience;
  while (!stopped()) {
    absl::StatusOr<StoredBatch> batch = source_->Next(options_.clock->Now() + kSlice);
    if (!absl::IsDeadlineExceeded(batch.status())) return batch;
    if (options_.clock->Now() >= log_after) {
      LogWarning("waiting for data: {}", batch.status().ToString());
      log_after = options_.clock->Now() + kOutageLogEvery;
    }
    RETURN_IF_ERROR(Heartbeat());
  }
  return absl::CancelledError("stopped");
}

absl::Status Learner::AwaitRows() {
  while (!stopped()) {
    const absl::StatusOr<replay::v1::GetStatsResponse> stats = options_.replay->GetStats(options_.clock->Now() + kCall);
    if (stats.ok()) {
      rows_appended_ = stats->rows_appended();
      break;
    }
    LogOutage("GetStats", stats.status());
    RETURN_IF_ERROR(KeepGroup());
    WaitForStop(kSlice);
  }
  while (!stopped()) {
    const absl::Status status = mirror_->WaitForRows(rows_appended_, kPatience, options_.clock->Now() + kSlice);
    if (!absl::IsDeadlineExceeded(status)) return status;
    RETURN_IF_ERROR(Heartbeat());
  }
  return absl::CancelledError("stopped");
}

absl::Status Learner::Heartbeat() {
  RETURN_IF_ERROR(KeepGroup());
  if (options_.clock->Now() - last_report_ < kReportEvery) return absl::OkStatus();
  const absl::Status status =
      options_.replay->ReserveUpdates(generation_, updates_to_report(), 0, options_.clock->Now() + kCall).status();
  last_report_ = options_.clock->Now();
  if (absl::IsFailedPrecondition(status)) return Annotate(status, "another learner took this run over");
  if (!status.ok()) LogOutage("ReserveUpdates", status);
  return absl::OkStatus();
}

void Learner::RefreshRows() {
  const absl::Time now = options_.clock->Now();
  if (!alternate() && now - last_stats_ >= kStatsEvery) {
    last_stats_ = now;
    const absl::StatusOr<replay::v1::GetStatsResponse> stats = options_.replay->GetStats(now + kCall);
    if (stats.ok()) rows_appended_ = stats->rows_appended();
  }
  const double steps = static_cast<double>(rows_appended_) * StepsPerRow(options_.experiment.environment());
  if (steps > 0) metrics_.updates_per_env_step.Set(static_cast<double>(updates_) / steps);
}

void Learner::Publish(bool always_keep) {
  publication_->Publish(trainer_->published(), {generation_, updates_}, always_keep);
}

void Learner::PublishIfDue() {
  if (publication_->Due(updates_)) Publish(/*always_keep=*/false);
}

Checkpoint Learner::State() const {
  Checkpoint checkpoint;
  checkpoint.updates = updates_;
  checkpoint.generation = generation_;
  checkpoint.sampler = source_->State();
  checkpoint.experiment = ToText(options_.experiment);
  checkpoint.tensors = trainer_->State();
  return checkpoint;
}

void Learner::SaveCheckpoint() {
  checkpoints_->Save(updates_, [this] { return State(); });
}

// Counters and randomness go on, so that versions stay ordered and the same batches do not come again.
absl::Status Learner::RollBack() {
  if (!leads()) return absl::OkStatus();  // rank 0 gives it the parameters
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, checkpoints_->ToGoBackTo(updates_));
  RETURN_IF_ERROR(Annotate(trainer_->Restore(checkpoint.tensors, /*with_random=*/false), options_.checkpoint_dir));
  return GiveState(/*with_random=*/false);
}

absl::Status Learner::Tell(Order order, int64_t number) {
  if (options_.group == nullptr || !leads()) return absl::OkStatus();
  last_told_ = options_.clock->Now();
  int64_t words[] = {static_cast<int64_t>(order), number};
  return options_.group->Broadcast(absl::MakeSpan(words));
}

absl::Status Learner::KeepGroup() {
  return options_.clock->Now() - last_told_ < kTellEvery ? absl::OkStatus() : Tell(Order::kIdle);
}

absl::Status Learner::GiveState(bool with_random) {
  if (options_.group == nullptr) return absl::OkStatus();
  ASSIGN_OR_RETURN(std::string state, SerializeCheckpoint(State()));
  RETURN_IF_ERROR(Tell(Order::kState, with_random ? 1 : 0));
  return options_.group->Broadcast(state);
}

absl::Status Learner::AwaitGroup() {
  if (options_.group == nullptr) return absl::OkStatus();
  while (!stopped()) {
    RETURN_IF_ERROR(Tell(Order::kPrepare, alternate() || options_.wait_for_all_rows ? rows_appended_ : 0));
    ASSIGN_OR_RETURN(const int64_t ready, options_.group->Sum(1));
    if (ready == options_.group->size()) return absl::OkStatus();
    RETURN_IF_ERROR(Heartbeat());
  }
  return absl::CancelledError("stopped");
}

absl::Status Learner::Follow() {
  mirror_->Follow(std::move(options_.watcher));
  absl::Time leave_at = absl::InfiniteFuture();
  absl::StatusOr<bool> more = true;
  while (more.ok() && *more && options_.clock->Now() < leave_at) {
    more = Obey();
    if (stopped()) leave_at = std::min(leave_at, options_.clock->Now() + kFollowAfterStop);
  }
  mirror_->Stop();
  if (!more.ok()) {
    LogError("learning ended updates={} reason={}", updates_, more.status().ToString());
    return more.status();
  }
  LogInfo("learner stopped updates={} rank={}", updates_, options_.group->rank());
  return absl::OkStatus();
}

absl::StatusOr<bool> Learner::Obey() {
  int64_t words[2] = {};
  RETURN_IF_ERROR(options_.group->Broadcast(absl::MakeSpan(words)));
  switch (static_cast<Order>(words[0])) {
    case Order::kIdle:
      return true;
    case Order::kState:
      RETURN_IF_ERROR(TakeState(/*with_random=*/words[1] == 1));
      return true;
    case Order::kPrepare: {
      ASSIGN_OR_RETURN(const bool ready, Prepare(words[1]));
      RETURN_IF_ERROR(options_.group->Sum(ready ? 1 : 0).status());
      return true;
    }
    case Order::kUpdate:
      RETURN_IF_ERROR(MakeUpdate(/*more=*/words[1] == 1));
      return true;
    case Order::kStop:
      if (words[1] == 1) Stop();
      return false;
  }
  return absl::InternalError(absl::StrCat("rank 0 gave order ", words[0], ", expected 0 to 4: is it of another version?"));
}

absl::Status Learner::TakeState(bool with_random) {
  std::string bytes;
  RETURN_IF_ERROR(options_.group->Broadcast(bytes));
  absl::StatusOr<Checkpoint> state = ParseCheckpoint(bytes);
  if (!state.ok()) return Annotate(state.status(), "the state that rank 0 gave");
  if (state->experiment != ToText(options_.experiment)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rank ", options_.group->rank(), " has another configuration than rank 0: start all ranks with the same one"));
  }
  RETURN_IF_ERROR(trainer_->Restore(state->tensors, with_random));
  if (!with_random) {
    LogError("back to the parameters of rank 0's checkpoint updates={} rank={}", updates_, options_.group->rank());
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(source_->SetState(state->sampler));
  prepared_.reset();
  updates_ = state->updates;
  absl::MutexLock lock(&mu_);
  progress_.updates = updates_;
  return absl::OkStatus();
}

absl::StatusOr<bool> Learner::Prepare(int64_t rows) {
  const absl::Status there = mirror_->WaitForRows(rows, kPatience, options_.clock->Now() + kSlice);
  if (absl::IsDeadlineExceeded(there)) return false;
  RETURN_IF_ERROR(there);
  if (prepared_.has_value()) return true;
  absl::StatusOr<StoredBatch> batch = source_->Next(options_.clock->Now() + kSlice);
  if (absl::IsDeadlineExceeded(batch.status())) return false;
  RETURN_IF_ERROR(batch.status());
  prepared_ = *std::move(batch);
  return true;
}

void Learner::LogOutage(const char* call, const absl::Status& status) {
  if (options_.clock->Now() - last_outage_log_ < kOutageLogEvery) return;
  last_outage_log_ = options_.clock->Now();
  LogWarning("replay does not answer, trying on call={} reason={}", call, status.ToString());
}

void Learner::Stop() {
  absl::MutexLock lock(&mu_);
  stopped_ = true;
  stop_requested_.SignalAll();
}

bool Learner::stopped() const {
  absl::MutexLock lock(&mu_);
  return stopped_;
}

void Learner::WaitForStop(absl::Duration at_most) {
  const absl::Time deadline = options_.clock->Now() + at_most;
  absl::MutexLock lock(&mu_);
  while (!stopped_ && options_.clock->Now() < deadline) options_.clock->WaitUntil(stop_requested_, mu_, deadline);
}

Learner::Progress Learner::progress() const {
  absl::MutexLock lock(&mu_);
  return progress_;
}

bool Learner::alternate() const {
  return options_.experiment.learning().schedule() == config::v1::Learning::ALTERNATE;
}

}  // namespace orrery
