#include "libs/learning/publication.h"

#include <algorithm>
#include <utility>

#include "absl/status/statusor.h"
#include "libs/base/log.h"
#include "libs/world_model/snapshot.h"

namespace orrery {
namespace {

constexpr absl::Duration kCall = absl::Seconds(5);       // deadline of a call to replay
constexpr absl::Duration kKeepEvery = absl::Seconds(5);  // snapshots handed to replay (CONCURRENT)
constexpr absl::Duration kSlice = absl::Milliseconds(500);
constexpr absl::Duration kAwaitPlanners = absl::Seconds(10);
constexpr absl::Duration kErrorLogEvery = absl::Seconds(30);

}  // namespace

Publication::Publication(Options options) : options_(std::move(options)) {
  if (!alternate()) keeper_ = std::make_unique<SnapshotKeeper>(options_.replay, kCall, options_.put_errors);
}

bool Publication::alternate() const {
  return options_.experiment.learning().schedule() == config::v1::Learning::ALTERNATE;
}

void Publication::Publish(const WorldModel& model, SnapshotVersion version, bool always_keep) {
  const absl::Time begin = last_snapshot_ = options_.clock->Now();
  last_updates_ = version.counter;
  SnapshotInfo info;
  info.model = options_.experiment.model();
  info.planner = options_.experiment.planner();
  info.run = options_.experiment.name();
  info.generation = version.generation;
  info.counter = version.counter;
  absl::StatusOr<std::string> file = SerializeSnapshot(model, info);
  if (!file.ok()) {
    LogError("snapshot not published updates={} reason={}", version.counter, file.status().ToString());
    return;
  }
  options_.publisher->Publish(version, *file);
  newest_ = version;
  options_.version->Set(static_cast<double>(version.counter));
  if (options_.on_snapshot) options_.on_snapshot(version, *file);
  if (always_keep || begin - last_kept_ >= kKeepEvery) {
    last_kept_ = begin;
    Keep({version, *std::move(file)});
  }
  options_.seconds->Observe(absl::ToDoubleSeconds(options_.clock->Now() - begin));
}

void Publication::Keep(Store::Snapshot snapshot) {
  const absl::Time now = options_.clock->Now();
  if (keeper_ != nullptr) {
    keeper_->Put(std::move(snapshot));
    return;
  }
  const absl::Status kept = options_.replay->PutSnapshot(snapshot, now + kCall);
  if (kept.ok()) return;
  options_.put_errors->Increment();
  if (now - last_error_log_ < kErrorLogEvery) return;
  last_error_log_ = now;
  LogWarning("replay does not keep the snapshot updates={} reason={}", snapshot.version.counter, kept.ToString());
}

bool Publication::Due(int64_t updates) const {
  if (alternate() || updates == last_updates_) return false;
  const config::v1::Learning& learning = options_.experiment.learning();
  if (updates % learning.snapshot_every_updates() == 0) return true;
  return learning.has_snapshot_every_seconds() &&
         options_.clock->Now() - last_snapshot_ >= absl::Seconds(learning.snapshot_every_seconds());
}

void Publication::AwaitAPlanner(absl::Duration patience, Stopped stopped) const {
  if (!alternate()) return;
  const absl::Time deadline = options_.clock->Now() + patience;
  while (!stopped()) {
    const absl::Time now = options_.clock->Now();
    if (options_.publisher->AwaitSubscriber(std::min(deadline, now + kSlice))) return;
    if (now >= deadline) {
      LogInfo("no planner has subscribed, learning begins without one waited={}", absl::FormatDuration(patience));
      return;
    }
  }
}

void Publication::AwaitPlanners(Stopped stopped) const {
  if (!alternate()) return;
  const absl::Time deadline = options_.clock->Now() + kAwaitPlanners;
  while (!stopped()) {
    const absl::Time now = options_.clock->Now();
    if (options_.publisher->AwaitAcknowledgements(newest_, std::min(deadline, now + kSlice))) return;
    if (now >= deadline) {
      LogWarning("not every planner serves the newest snapshot, going on without those that do not updates={}",
                 newest_.counter);
      options_.publisher->GiveUpOnLate(newest_);
      return;
    }
  }
}

void Publication::Flush() {
  if (keeper_ == nullptr) return;
  if (const absl::Status kept = keeper_->Flush(); !kept.ok()) {
    LogError("replay does not keep the last snapshot updates={} reason={}", newest_.counter, kept.ToString());
  }
}

}  // namespace orrery
