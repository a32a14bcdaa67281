#include "libs/learning/snapshot_keeper.h"

#include <utility>

#include "absl/time/clock.h"
#include "libs/base/log.h"

namespace orrery {

SnapshotKeeper::SnapshotKeeper(std::shared_ptr<ReplayClient> replay, absl::Duration call, prometheus::Counter* errors)
    : replay_(std::move(replay)), call_(call), errors_(errors), thread_([this] { Work(); }) {}

SnapshotKeeper::~SnapshotKeeper() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    changed_.SignalAll();
  }
  thread_.join();
}

void SnapshotKeeper::Put(Store::Snapshot snapshot) {
  absl::MutexLock lock(&mu_);
  waiting_ = std::move(snapshot);
  changed_.SignalAll();
}

absl::Status SnapshotKeeper::Flush() {
  absl::MutexLock lock(&mu_);
  const auto idle = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !waiting_.has_value() && !writing_; };
  while (!idle()) changed_.Wait(&mu_);
  if (last_.ok()) return last_;
  waiting_ = std::exchange(failed_, std::nullopt);
  changed_.SignalAll();
  while (!idle()) changed_.Wait(&mu_);
  return last_;
}

absl::Status SnapshotKeeper::Write(const Store::Snapshot& snapshot) {
  const absl::Status status = replay_->PutSnapshot(snapshot, absl::Now() + call_);
  if (!status.ok()) errors_->Increment();
  return status;
}

void SnapshotKeeper::Work() {
  while (true) {
    Store::Snapshot snapshot;
    {
      absl::MutexLock lock(&mu_);
      while (!stopping_ && !waiting_.has_value()) changed_.Wait(&mu_);
      if (stopping_) return;
      snapshot = *std::move(waiting_);
      waiting_.reset();
      writing_ = true;
    }
    absl::Status status = Write(snapshot);
    absl::MutexLock lock(&mu_);
    if (status.ok()) {
      failed_.reset();
    } else {
      if (last_.ok()) {
        LogWarning("snapshot not kept in replay updates={} reason={}", snapshot.version.counter, status.ToString());
      }
      failed_ = std::move(snapshot);
    }
    last_ = std::move(status);
    writing_ = false;
    changed_.SignalAll();
  }
}

}  // namespace orrery
