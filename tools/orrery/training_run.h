// A whole run in one process: the service classes that the four programs serve, over in-process channels. Or without replay and
// actor: learning from a data set that was stored before.
#pragma once

#include <grpcpp/grpcpp.h>
#include <prometheus/registry.h>

#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "libs/config/config.h"
#include "libs/learning/learner.h"
#include "libs/learning/snapshot_publisher.h"
#include "libs/replay/store.h"
#include "libs/telemetry/service_host.h"
#include "services/actor/actor.h"
#include "services/learner/learner_service_impl.h"
#include "services/planner/planner_service_impl.h"
#include "services/planner/snapshot_subscriber.h"
#include "services/replay/replay_service_impl.h"
#include "tools/orrery/offline_data.h"
#include "tools/orrery/run_log.h"

namespace orrery {

// Owns store, services, learner and actor, and the threads of the last two. Create, Start, perhaps EndLearning, then Stop once;
// one thread.
class TrainingRun {
 public:
  struct Options {
    config::v1::Experiment experiment;  // valid, its model complete
    std::string run_dir;                // exists
    std::string store;                  // "file:FOLDER", "memory:", "redis://…"
    std::string offline_data_set;       // name of one in the store, from which alone is learnt; empty: an actor collects
    std::string metrics_listen;         // empty: none
    std::string device = "cpu";
    int threads = 1;  // that share an update
    bool resume = false;
  };
  static absl::StatusOr<std::unique_ptr<TrainingRun>> Create(Options options);
  ~TrainingRun();

  void Start();
  // False once the run is complete, learning.max_updates are made, or learner or actor has ended with an error.
  bool Running() const;
  // Ends the running episode and learning, saves checkpoint and snapshot. The planner goes on. The first error of actor or learner.
  absl::Status EndLearning();
  // Has the planner serve the newest snapshot, where there is no actor for which it always does.
  absl::Status ServeNewest();
  // To the services.
  std::shared_ptr<grpc::Channel> Channel() { return host_->InProcessChannel(); }
  // EndLearning, then ends everything else; the same result.
  absl::Status Stop();

  RunTotals totals() const { return log_->totals(); }
  Learner::Progress progress() const { return learner_->progress(); }
  // The newest snapshot, a whole file that is replaced atomically.
  std::string snapshot_path() const { return options_.run_dir + "/snapshots/latest.safetensors"; }

 private:
  explicit TrainingRun(Options options) : options_(std::move(options)) {}
  bool offline() const { return !options_.offline_data_set.empty(); }
  absl::Status OpenData();
  absl::Status MakePlanner();
  absl::Status MakeReplay();
  absl::Status MakeHost();
  absl::Status MakeLearner(std::shared_ptr<grpc::Channel> channel);
  absl::Status MakeActor(std::shared_ptr<grpc::Channel> channel);
  void Ended(const absl::Status& status, bool learner);

  const Options options_;
  const std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  std::unique_ptr<OfflineData> data_;  // offline only
  std::unique_ptr<Store> store_;       // like replay, subscriber and actor not offline
  std::unique_ptr<ReplayServer> replay_;
  SnapshotPublisher publisher_;
  std::unique_ptr<Learner> learner_;
  std::unique_ptr<LearnerServiceImpl> learner_service_;
  std::unique_ptr<PlannerServer> planner_;
  std::unique_ptr<RunLog> log_;
  std::unique_ptr<ServiceHost> host_;
  std::unique_ptr<SnapshotSubscriber> subscriber_;
  std::unique_ptr<Actor> actor_;

  mutable absl::Mutex mu_;
  int running_ ABSL_GUARDED_BY(mu_) = 0;  // of learner and actor
  bool learner_ended_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status error_ ABSL_GUARDED_BY(mu_);
  std::thread actor_thread_;
  std::thread learner_thread_;
};

}  // namespace orrery
