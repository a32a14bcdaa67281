// What the learner does with its snapshots: when one is due, who gets it, and whether planners serve it.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/time/time.h"
#include "libs/base/clock.h"
#include "libs/client/replay_client.h"
#include "libs/config/config.h"
#include "libs/learning/snapshot_keeper.h"
#include "libs/learning/snapshot_publisher.h"
#include "libs/replay/store.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// Not thread-safe: the learner's thread only. Errors are counted and logged, and never end the learner.
//
// ALTERNATE: replay has what it is handed, or has failed to take it, when Publish returns; planners can be waited for. CONCURRENT: a
// snapshot is due after so many updates or seconds, and a thread of its own hands replay one every 5 s.
class Publication {
 public:
  struct Options {
    config::v1::Experiment experiment;  // valid, its model complete
    std::shared_ptr<ReplayClient> replay;
    std::function<void(SnapshotVersion, const std::string& file)> on_snapshot;  // may be empty
    // All must outlive this.
    SnapshotPublisher* publisher = nullptr;
    prometheus::Gauge* version = nullptr;      // updates behind the newest snapshot
    prometheus::Histogram* seconds = nullptr;  // of one Publish
    prometheus::Counter* put_errors = nullptr;
    Clock* clock = &Clock::Real();
  };
  // Ends a wait early where it gives true; asked twice a second.
  using Stopped = absl::FunctionRef<bool()>;

  explicit Publication(Options options);

  // Makes the newest snapshot of `model`. Replay gets it, too; without `always_keep` only 5 s after it got the one before.
  void Publish(const WorldModel& model, SnapshotVersion version, bool always_keep);
  // CONCURRENT: whether the next one should be published after `updates`. False under ALTERNATE.
  bool Due(int64_t updates) const;
  // ALTERNATE: waits until a planner has subscribed, for `patience` at most.
  void AwaitAPlanner(absl::Duration patience, Stopped stopped) const;
  // ALTERNATE: waits until every planner serves the newest snapshot, 10 s at most; those that do not by then, no more
  // before they do.
  void AwaitPlanners(Stopped stopped) const;
  // Waits until replay has the newest snapshot that it was handed, or has failed to take it.
  void Flush();

 private:
  bool alternate() const;
  void Keep(Store::Snapshot snapshot);

  const Options options_;
  std::unique_ptr<SnapshotKeeper> keeper_;  // CONCURRENT
  SnapshotVersion newest_;
  int64_t last_updates_ = 0;  // behind the last one, also where it could not be made
  absl::Time last_snapshot_;
  absl::Time last_kept_ = absl::InfinitePast(), last_error_log_ = absl::InfinitePast();
};

}  // namespace orrery
