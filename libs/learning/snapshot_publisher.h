// From the learner to whoever follows its snapshots.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/base/clock.h"
#include "libs/replay/store.h"

namespace orrery {

// A whole snapshot, shared by everyone who sends it.
struct PublishedSnapshot {
  SnapshotVersion version;
  std::string file;
  uint32_t checksum = 0;  // of `file`
};

// Hands the newest snapshot to every subscriber and knows what each serves. Thread-safe. Publish never waits for a
// subscriber: one that is still busy with an older snapshot is handed the newest when it asks again.
class SnapshotPublisher {
 public:
  // A follower. The calls come one at a time, with the publisher's lock held: they must not block or call back.
  class Subscriber {
   public:
    virtual ~Subscriber() = default;
    // A newer snapshot than any before; replaces one that was not used yet.
    virtual void OnSnapshot(std::shared_ptr<const PublishedSnapshot> snapshot) = 0;
    // Nothing more will come.
    virtual void OnClose() = 0;
  };

  explicit SnapshotPublisher(Clock* clock = &Clock::Real()) : clock_(clock) {}

  // Makes `file` the newest; ignored unless its version is above.
  void Publish(SnapshotVersion version, std::string file);
  // Adds a subscriber that serves `serving` ({0, 0}: nothing); it is handed the newest at once if that is above. After
  // Close it is told so at once.
  void Subscribe(Subscriber* subscriber, SnapshotVersion serving);
  // Once this returns no call to it is running or will come. Unknown ones are ignored.
  void Unsubscribe(Subscriber* subscriber);
  void Acknowledge(Subscriber* subscriber, SnapshotVersion serving);
  // Waits until every subscriber of that moment serves `version` or a newer one. False: not by the deadline, or closed.
  bool AwaitAcknowledgements(SnapshotVersion version, absl::Time deadline);
  // Those that do not serve `version`, such as ones that refuse it, are not waited for again before they serve the newest.
  void GiveUpOnLate(SnapshotVersion version);
  // Waits until there is a subscriber. False: not by the deadline, or closed.
  bool AwaitSubscriber(absl::Time deadline);
  // Tells every subscriber, and ends waits.
  void Close();

  SnapshotVersion version() const;  // {0, 0}: none yet
  int subscribers() const;

 private:
  struct Following {
    SnapshotVersion serving;
    bool late = false;  // was given up on
  };
  bool AllServe(SnapshotVersion version) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  Clock* const clock_;
  mutable absl::Mutex mu_;
  absl::CondVar changed_;  // subscribers, or what they serve
  std::shared_ptr<const PublishedSnapshot> newest_ ABSL_GUARDED_BY(mu_);
  std::map<Subscriber*, Following> subscribers_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace orrery
