// Keeps a planner's snapshot fresh: subscribed to the learner, with replay as the fallback.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/clock.h"
#include "libs/client/channel.h"
#include "libs/serving/snapshot_holder.h"
#include "orrery/learner/v1/learner.grpc.pb.h"
#include "orrery/replay/v1/replay.grpc.pb.h"

namespace orrery {

// One thread that holds a subscription at the learner, loads what comes and answers with the newest that is loaded: the one
// served, unless a rollback holds another, so that nothing waits for a planner that is held. While no learner answers, it asks
// replay for the newest snapshot and goes on trying, with growing waits; while one answers but sends nothing (it waits for its
// lease, say) and nothing is loaded, it asks replay every poll_interval. A snapshot of replay's that was refused is fetched
// again only after kRefusedPause. Thread-safe.
class SnapshotSubscriber {
 public:
  struct Options {
    std::string run;                         // of learner and replay
    std::string planner_id;                  // 1 to 128 characters, unique among planners
    std::shared_ptr<grpc::Channel> learner;  // may be null
    std::shared_ptr<grpc::Channel> replay;   // may be null
    SnapshotHolder* holder = nullptr;        // required; must outlive this
    Clock* clock = &Clock::Real();           // must outlive this
    // Between two looks at replay without a learner to subscribe to, or with one that sends nothing while nothing is loaded.
    absl::Duration poll_interval = absl::Seconds(2);
  };
  // Starts the thread.
  explicit SnapshotSubscriber(Options options);
  // Ends it.
  ~SnapshotSubscriber();

  // What was wrong may have passed by then, such as a device without memory; a damaged snapshot costs little at this pace.
  static constexpr absl::Duration kRefusedPause = absl::Minutes(5);

 private:
  // A call that the destructor can cancel.
  class Call;

  void Loop() ABSL_LOCKS_EXCLUDED(mu_);
  // Returns when the stream has ended, with the reason; OK for one that had lasted and sent nothing damaged.
  absl::Status Subscribe();
  // Until the operation of the stream that has begun is over; false: it failed. Asks replay meanwhile while nothing is loaded.
  bool Await(grpc::CompletionQueue& queue);
  // Loads a snapshot of the learner's; logs when they begin to be older than the newest that is loaded.
  void Load(const Store::Snapshot& snapshot);
  // Loads replay's snapshot if it is newer than the one served and was not refused a short time ago.
  absl::Status AskReplay();
  // Version of replay's newest snapshot; {0, 0}: it has none.
  absl::StatusOr<SnapshotVersion> AskVersion();
  // Fetches replay's newest snapshot.
  absl::StatusOr<Store::Snapshot> Fetch();
  // Version of the newest snapshot that is loaded; {0, 0}: none.
  SnapshotVersion Newest() const;
  // Waits; false: closed.
  bool Wait(absl::Duration duration) ABSL_LOCKS_EXCLUDED(mu_);
  bool closed() const ABSL_LOCKS_EXCLUDED(mu_);
  // Logs when the source of snapshots goes away or comes back, not at every try.
  void NoteTrouble(const absl::Status& replay);

  // Constant after construction.
  const Options options_;
  const std::unique_ptr<learner::v1::LearnerService::Stub> learner_;  // may be null
  const std::unique_ptr<replay::v1::ReplayService::Stub> replay_;     // may be null

  // Of the thread.
  Backoff backoff_;
  absl::Status ended_;  // how the last subscription did; OK once a snapshot has come
  std::string trouble_;
  bool told_older_ = false;  // that the learner's snapshots are older
  SnapshotVersion refused_;                          // of replay's; {0, 0}: none
  absl::Time refused_until_ = absl::InfinitePast();  // before then it is not fetched again

  mutable absl::Mutex mu_;
  absl::CondVar woken_;
  std::vector<grpc::ClientContext*> contexts_ ABSL_GUARDED_BY(mu_);  // of the running calls, one within the other
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace orrery
