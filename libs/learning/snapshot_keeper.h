// Keeps the newest snapshot in replay without making the learner wait for it.
#pragma once

#include <prometheus/counter.h>

#include <memory>
#include <optional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/client/replay_client.h"
#include "libs/replay/store.h"

namespace orrery {

// Thread-safe. Snapshots are written on a thread of its own, one at a time; of those that come meanwhile only the newest is.
// One that cannot be written is counted, the first in a row is logged, and only Flush tries it again.
class SnapshotKeeper {
 public:
  // `errors` must outlive the keeper. `call`: the time that one write may take.
  SnapshotKeeper(std::shared_ptr<ReplayClient> replay, absl::Duration call, prometheus::Counter* errors);
  // Waits for a write that has begun; what waits is dropped.
  ~SnapshotKeeper();
  SnapshotKeeper(const SnapshotKeeper&) = delete;
  SnapshotKeeper& operator=(const SnapshotKeeper&) = delete;

  // Hands over a snapshot, newer than those before.
  void Put(Store::Snapshot snapshot);
  // Waits until nothing is left to write. The status of the last write, which is tried once more when it has failed.
  absl::Status Flush();

 private:
  void Work();
  absl::Status Write(const Store::Snapshot& snapshot);

  // Constant after construction.
  const std::shared_ptr<ReplayClient> replay_;
  const absl::Duration call_;
  prometheus::Counter* const errors_;

  absl::Mutex mu_;
  absl::CondVar changed_;
  std::optional<Store::Snapshot> waiting_ ABSL_GUARDED_BY(mu_);
  std::optional<Store::Snapshot> failed_ ABSL_GUARDED_BY(mu_);  // the last one, when it could not be written
  absl::Status last_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;  // last: it uses everything above
};

}  // namespace orrery
