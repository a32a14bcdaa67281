#include "tools/orrery/training_run.h"

#include <utility>

#include "libs/base/file.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/client/replay_client.h"

namespace orrery {

absl::StatusOr<std::unique_ptr<TrainingRun>> TrainingRun::Create(Options options) {
  std::unique_ptr<TrainingRun> run(new TrainingRun(std::move(options)));
  if (run->offline()) RETURN_IF_ERROR(run->OpenData());
  RETURN_IF_ERROR(MakeDirectory(run->options_.run_dir + "/snapshots"));
  RETURN_IF_ERROR(run->MakePlanner());
  if (!run->offline()) RETURN_IF_ERROR(run->MakeReplay());
  RETURN_IF_ERROR(run->MakeHost());
  const std::shared_ptr<grpc::Channel> channel = run->host_->InProcessChannel();
  RETURN_IF_ERROR(run->MakeLearner(channel));
  if (!run->offline()) RETURN_IF_ERROR(run->MakeActor(channel));
  return run;
}

absl::Status TrainingRun::OpenData() {
  OfflineData::Options data;
  data.experiment = options_.experiment;
  data.location = options_.store;
  data.data_set = options_.offline_data_set;
  ASSIGN_OR_RETURN(data_, OfflineData::Open(data));
  return absl::OkStatus();
}

absl::Status TrainingRun::MakePlanner() {
  const config::v1::Experiment& experiment = options_.experiment;
  PlannerServer::Options planner;
  planner.service = experiment.planner_service();
  planner.planner = experiment.planner();
  planner.run = experiment.name();
  planner.device = options_.device;
  planner.registry = registry_;
  ASSIGN_OR_RETURN(planner_, PlannerServer::Create(std::move(planner)));
  return absl::OkStatus();
}

absl::Status TrainingRun::MakeReplay() {
  const config::v1::Experiment& experiment = options_.experiment;
  ASSIGN_OR_RETURN(store_, OpenStore({.location = options_.store,
                                      .run = experiment.name(),
                                      .partitions = experiment.replay().partitions()}));
  ASSIGN_OR_RETURN(replay_, ReplayServer::Create({.experiment = experiment, .store = store_.get(), .registry = registry_}));
  return absl::OkStatus();
}

absl::Status TrainingRun::MakeHost() {
  learner_service_ = std::make_unique<LearnerServiceImpl>(options_.experiment.name(), &publisher_, [this] {
    const Learner::Progress progress = learner_->progress();
    return LearnerServiceImpl::Progress{progress.updates, progress.loss};
  });
  HostOptions host;
  host.name = "train";
  host.metrics_listen = options_.metrics_listen;
  host.registry = registry_;
  host.services = {learner_service_.get(), planner_->service()};
  if (replay_ != nullptr) host.services.push_back(replay_->service());
  ASSIGN_OR_RETURN(host_, ServiceHost::Start(std::move(host)));
  return absl::OkStatus();
}

absl::Status TrainingRun::MakeLearner(std::shared_ptr<grpc::Channel> channel) {
  const config::v1::Experiment& experiment = options_.experiment;
  Learner::Options learner;
  learner.experiment = experiment;
  if (offline()) {
    // Nobody collects between updates, and the mirror takes what is there.
    learner.experiment.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
    learner.experiment.mutable_replay()->set_max_rows(data_->rows());
    learner.wait_for_all_rows = true;
    learner.replay = data_->MakeReplay();
    learner.watcher = data_->MakeWatcher();
  } else {
    learner.replay = std::make_shared<ReplayClient>(channel, experiment.name());
    learner.watcher = ChunkWatcher::Create(channel, experiment.name());
  }
  // Always the same: a run in one process has one learner, and resuming must not wait for the lease of the process before.
  learner.learner_id = "train";
  learner.checkpoint_dir = options_.run_dir + "/checkpoints";
  learner.resume = options_.resume;
  ASSIGN_OR_RETURN(learner.device, CatchExceptions("--device", [&]() -> absl::StatusOr<torch::Device> {
                     return torch::Device(options_.device);
                   }));
  learner.threads = options_.threads;
  learner.publisher = &publisher_;
  learner.registry = registry_.get();
  learner.on_update = [this](const Learner::UpdateReport& report) { log_->AddUpdate(report); };
  learner.on_snapshot = [this](SnapshotVersion, const std::string& file) {
    const absl::Status status = WriteFileAtomically(snapshot_path(), file);
    if (!status.ok()) LogError("snapshot not written: {}", status.ToString());
  };
  ASSIGN_OR_RETURN(learner_, Learner::Create(std::move(learner)));
  ASSIGN_OR_RETURN(log_, RunLog::Open(options_.run_dir, learner_->progress().updates,
                                      StepsPerRow(experiment.environment())));
  return absl::OkStatus();
}

absl::Status TrainingRun::MakeActor(std::shared_ptr<grpc::Channel> channel) {
  ActorOptions actor;
  actor.experiment = options_.experiment;
  actor.actor_id = "train";
  actor.replay = channel;
  actor.planner = channel;
  actor.registry = registry_;
  actor.on_episode = [this](const EpisodeSummary& episode) { log_->AddEpisode(episode, learner_->progress().updates); };
  ASSIGN_OR_RETURN(actor_, Actor::Create(std::move(actor)));
  return absl::OkStatus();
}

TrainingRun::~TrainingRun() { Stop().IgnoreError(); }

void TrainingRun::Ended(const absl::Status& status, bool learner) {
  absl::MutexLock lock(&mu_);
  running_ -= 1;
  learner_ended_ = learner_ended_ || learner;
  error_.Update(status);
}

void TrainingRun::Start() {
  {
    absl::MutexLock lock(&mu_);
    running_ = offline() ? 1 : 2;
  }
  if (offline()) {
    host_->SetReady(true);
  } else {
    replay_->Start([this](bool ready) { host_->SetReady(ready); });
    const std::shared_ptr<grpc::Channel> channel = host_->InProcessChannel();
    SnapshotSubscriber::Options subscriber;
    subscriber.run = options_.experiment.name();
    subscriber.planner_id = "train";
    subscriber.learner = channel;
    subscriber.replay = channel;
    subscriber.holder = &planner_->snapshots();
    subscriber_ = std::make_unique<SnapshotSubscriber>(std::move(subscriber));
    actor_thread_ = std::thread([this] { Ended(Annotate(actor_->Run(), "actor"), /*learner=*/false); });
  }
  learner_thread_ = std::thread([this] { Ended(Annotate(learner_->Run(), "learner"), /*learner=*/true); });
}

bool TrainingRun::Running() const {
  absl::MutexLock lock(&mu_);
  // The actor alone would wait for ever once the learner has made its last update.
  const bool made_all = learner_ended_ && options_.experiment.learning().has_max_updates();
  return error_.ok() && running_ > 0 && !made_all;
}

absl::Status TrainingRun::EndLearning() {
  // The actor first: what it sends at the end must still arrive.
  if (actor_thread_.joinable()) {
    actor_->Stop();
    actor_thread_.join();
  }
  actor_.reset();  // ends its stream to replay before replay does
  if (learner_thread_.joinable()) {
    learner_->Stop();
    learner_thread_.join();
  }
  absl::MutexLock lock(&mu_);
  return error_;
}

absl::Status TrainingRun::ServeNewest() {
  ASSIGN_OR_RETURN(const std::string file, ReadFile(snapshot_path()));
  return Annotate(planner_->snapshots().Load(file), snapshot_path());
}

absl::Status TrainingRun::Stop() {
  const absl::Status ended = EndLearning();
  subscriber_.reset();
  publisher_.Close();
  if (planner_ != nullptr) planner_->Close();
  if (replay_ != nullptr) replay_->Shutdown();
  if (host_ != nullptr) {
    host_->Shutdown(absl::Seconds(2));
    host_.reset();
  }
  return ended;
}

}  // namespace orrery
