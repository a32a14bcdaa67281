#include "libs/learning/snapshot_publisher.h"

#include <algorithm>
#include <utility>

#include "libs/base/file.h"

namespace orrery {

void SnapshotPublisher::Publish(SnapshotVersion version, std::string file) {
  const uint32_t checksum = Checksum(file);
  auto snapshot = std::make_shared<const PublishedSnapshot>(PublishedSnapshot{version, std::move(file), checksum});
  absl::MutexLock lock(&mu_);
  if (closed_ || (newest_ != nullptr && version <= newest_->version)) return;
  newest_ = std::move(snapshot);
  for (const auto& [subscriber, following] : subscribers_) {
    if (following.serving < version) subscriber->OnSnapshot(newest_);
  }
}

void SnapshotPublisher::Subscribe(Subscriber* subscriber, SnapshotVersion serving) {
  absl::MutexLock lock(&mu_);
  if (closed_) {
    subscriber->OnClose();
    return;
  }
  subscribers_[subscriber] = {serving};
  if (newest_ != nullptr && serving < newest_->version) subscriber->OnSnapshot(newest_);
  changed_.SignalAll();
}

void SnapshotPublisher::Unsubscribe(Subscriber* subscriber) {
  absl::MutexLock lock(&mu_);
  subscribers_.erase(subscriber);
  changed_.SignalAll();
}

void SnapshotPublisher::Acknowledge(Subscriber* subscriber, SnapshotVersion serving) {
  absl::MutexLock lock(&mu_);
  const auto found = subscribers_.find(subscriber);
  if (found == subscribers_.end()) return;
  Following& following = found->second;
  following.serving = std::max(following.serving, serving);
  following.late = following.late && newest_ != nullptr && following.serving < newest_->version;
  changed_.SignalAll();
}

bool SnapshotPublisher::AllServe(SnapshotVersion version) const {
  return std::all_of(subscribers_.begin(), subscribers_.end(),
                     [&](const auto& entry) { return entry.second.late || entry.second.serving >= version; });
}

void SnapshotPublisher::GiveUpOnLate(SnapshotVersion version) {
  absl::MutexLock lock(&mu_);
  for (auto& [subscriber, following] : subscribers_) following.late = following.late || following.serving < version;
}

bool SnapshotPublisher::AwaitAcknowledgements(SnapshotVersion version, absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  while (!closed_ && !AllServe(version)) {
    if (clock_->Now() >= deadline) return false;
    clock_->WaitUntil(changed_, mu_, deadline);
  }
  return !closed_;
}

bool SnapshotPublisher::AwaitSubscriber(absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  while (!closed_ && subscribers_.empty()) {
    if (clock_->Now() >= deadline) return false;
    clock_->WaitUntil(changed_, mu_, deadline);
  }
  return !closed_;
}

void SnapshotPublisher::Close() {
  absl::MutexLock lock(&mu_);
  if (closed_) return;
  closed_ = true;
  for (const auto& [subscriber, following] : subscribers_) subscriber->OnClose();
  subscribers_.clear();
  changed_.SignalAll();
}

SnapshotVersion SnapshotPublisher::version() const {
  absl::MutexLock lock(&mu_);
  return newest_ == nullptr ? SnapshotVersion{} : newest_->version;
}

int SnapshotPublisher::subscribers() const {
  absl::MutexLock lock(&mu_);
  return static_cast<int>(subscribers_.size());
}

}  // namespace orrery
