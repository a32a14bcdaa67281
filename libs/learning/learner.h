// The learner: reserves updates from replay, makes them, publishes snapshots, keeps checkpoints.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/base/clock.h"
#include "libs/client/replay_client.h"
#include "libs/config/config.h"
#include "libs/learning/checkpoint.h"
#include "libs/learning/checkpoint_keeper.h"
#include "libs/learning/data_parallel.h"
#include "libs/learning/mirror.h"
#include "libs/learning/publication.h"
#include "libs/learning/snapshot_publisher.h"
#include "libs/learning/trainer.h"

namespace orrery {

// Run on one thread; Stop and progress from any.
//
// ALTERNATE: waits until the mirror has every acknowledged row, makes all updates that are owed, saves a checkpoint,
// publishes, waits (10 s at most) until the subscribed planners serve that snapshot, reports: killed at any moment and resumed,
// it comes to the same parameters. CONCURRENT: small grants, a snapshot every snapshot_every_updates or
// snapshot_every_seconds, whichever comes first. A replay service that is away is waited for; only a lease taken over by another
// learner, data that do not fit the mirror, and a model that cannot be trained end the run with an error.
//
// A learner that comes back under ALTERNATE first waits for a planner (5 s at most): those of before need a moment to subscribe
// again, and until they do, they serve a snapshot that is not this one.
//
// With a group (data_parallel.h) every rank has a learner with the same configuration. Rank 0 alone holds the run, publishes,
// saves and decides; it begins by giving its parameters, optimizer and randomness to the others, and then tells them each update.
// The others need `replay` and `watcher` only for their mirrors. When one rank ends with an error, or is killed, all do.
class Learner {
 public:
  struct UpdateReport {
    int64_t updates = 0;  // made so far, this one included
    UpdateResult result;
    double update_seconds = 0;
    double batch_wait_seconds = 0;
    int64_t rows_appended = 0;  // training rows acknowledged, as last heard from replay
  };
  struct Options {
    config::v1::Experiment experiment;  // valid, its model complete (complete_model.h)
    std::string learner_id;             // unique among learners
    std::string checkpoint_dir;         // empty: no checkpoints
    bool resume = false;                // from the newest checkpoint, where there is one
    bool wait_for_all_rows = false;     // at first, also when CONCURRENT: for data that do not grow
    torch::Device device = torch::kCPU;
    int threads = 1;  // that share an update on the CPU; LibTorch's own are better left at one (parallel_rows.h)
    std::shared_ptr<ReplayClient> replay;
    std::unique_ptr<ChunkWatcher> watcher;
    SnapshotPublisher* publisher = nullptr;    // must outlive the learner
    prometheus::Registry* registry = nullptr;  // must outlive the learner
    std::function<void(const UpdateReport&)> on_update;                        // on the learner's thread; may be empty
    std::function<void(SnapshotVersion, const std::string& file)> on_snapshot;  // likewise
    DataParallel* group = nullptr;  // must outlive the learner; null: it learns alone
    // Under ALTERNATE, for a first subscriber when the run had a learner before.
    absl::Duration planner_patience = absl::Seconds(5);
    Clock* clock = &Clock::Real();
  };
  struct Progress {
    int64_t updates = 0;
    double loss = 0;  // total of the last update that was not skipped
  };

  // FAILED_PRECONDITION: checkpoints are there and `resume` is not set, or they are of another run; RESOURCE_EXHAUSTED: the
  // data set would not fit in mirror_bytes; INVALID_ARGUMENT: the checkpoint is of another model, or learning.batch_size is no
  // multiple of the group's ranks.
  static absl::StatusOr<std::unique_ptr<Learner>> Create(Options options);
  ~Learner();

  // Until the run is complete, learning.max_updates are made or Stop is called (OK, with a checkpoint saved), or learning
  // cannot go on. UNAVAILABLE: the group has failed; nothing was saved since the last checkpoint. A rank other than 0 goes on after
  // Stop until rank 0 ends, 10 s at most.
  absl::Status Run();
  void Stop();
  // Whether Stop was called, here or at rank 0.
  bool stopped() const;
  Progress progress() const;
  // What it has learnt; on the learner's thread, or when Run has returned.
  const WorldModel& model() const { return trainer_->model(); }

 private:
  struct Metrics {
    explicit Metrics(prometheus::Registry& registry);
    prometheus::Registry& registry;
    prometheus::Counter& updates;
    prometheus::Counter& skipped_updates;
    prometheus::Counter& checkpoint_errors;
    prometheus::Counter& put_errors;
    prometheus::Counter& refused_chunks;
    prometheus::Histogram& update_seconds;
    prometheus::Histogram& batch_wait_seconds;
    prometheus::Histogram& publish_seconds;
    prometheus::Gauge& gradient_norm;
    prometheus::Gauge& learning_rate;
    prometheus::Gauge& updates_per_env_step;
    prometheus::Gauge& snapshot_version;
  };

  // What rank 0 tells the others.
  enum class Order : int64_t {
    kIdle = 0,     // nothing: it is still there
    kState = 1,    // to take its state, which follows; with its randomness where `number` is 1
    kPrepare = 2,  // to wait, for a moment, for `number` rows and the next batch, and to say whether both are there
    kUpdate = 3,   // to make one update; `number` 1: another one follows from the same data
    kStop = 4,     // to end; `number` 1: because Stop was called
  };

  explicit Learner(Options options);
  absl::Status Initialize();
  absl::Status Resume();  // rank 0: from its newest checkpoint, where there is one
  absl::Status Acquire();  // waits while another learner holds the lease
  void Release();          // lets another learner take over at once
  absl::Status Lead();     // Run while this learner holds the run
  // Reserves and makes one block of updates. False: ended. Errors end the run.
  absl::StatusOr<bool> Step();
  absl::StatusOr<bool> MakeUpdates(int32_t count);
  // `more`: another one follows from the same data.
  absl::Status MakeUpdate(bool more);
  absl::StatusOr<StoredBatch> NextBatch();
  // Rank 0, where there is a group; OK without one.
  bool leads() const { return options_.group == nullptr || options_.group->rank() == 0; }
  absl::Status Tell(Order order, int64_t number = 0);
  absl::Status KeepGroup();   // tells the others now and then that it is still there
  absl::Status GiveState(bool with_random);
  absl::Status AwaitGroup();  // until every rank has its next batch
  // Every other rank.
  absl::Status Follow();
  absl::StatusOr<bool> Obey();  // one order; false: ended
  absl::Status TakeState(bool with_random);
  absl::StatusOr<bool> Prepare(int64_t rows);
  absl::Status AwaitRows();
  absl::Status Heartbeat();
  void RefreshRows();
  void Publish(bool always_keep);
  void PublishIfDue();
  Checkpoint State() const;
  void SaveCheckpoint();
  // Parameters and optimizer go back to the newest checkpoint.
  absl::Status RollBack();
  void Observe(const UpdateReport& report);
  void LogOutage(const char* call, const absl::Status& status);

  void WaitForStop(absl::Duration at_most);
  bool alternate() const;
  int64_t updates_to_report() const { return alternate() ? published_updates_ : updates_; }

  Options options_;  // constant after Initialize
  Metrics metrics_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<Mirror> mirror_;
  std::unique_ptr<MirroredSource> source_;
  std::unique_ptr<Publication> publication_;  // rank 0's

  // The learner's thread only.
  std::optional<CheckpointKeeper> checkpoints_;  // ranks other than 0 count only
  int64_t generation_ = 0;
  int64_t updates_ = 0;
  int64_t published_updates_ = 0;  // ALTERNATE: whose snapshot the planners serve
  int64_t rows_appended_ = 0;
  absl::Time last_report_, last_stats_, last_outage_log_, last_told_;
  std::optional<StoredBatch> prepared_;  // the next one, of a rank that is not 0
  std::map<std::string, prometheus::Gauge*> loss_gauges_;

  mutable absl::Mutex mu_;
  absl::CondVar stop_requested_;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  Progress progress_ ABSL_GUARDED_BY(mu_);
};

}  // namespace orrery
