// Time behind an interface, so that batching, leases and limits are tested without sleeping.
#pragma once

#include <functional>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace orrery {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() = 0;
  // Waits on `cv` (with `mu` held) until it is signalled or `deadline` has passed on this clock. Returns true on timeout.
  // May wake spuriously, as absl::CondVar does.
  virtual bool WaitUntil(absl::CondVar& cv, absl::Mutex& mu, absl::Time deadline) = 0;
  // The system's clock; lives for ever.
  static Clock& Real();
};

// A clock that stands still until told. Thread-safe.
class FakeClock : public Clock {
 public:
  explicit FakeClock(absl::Time start = absl::UnixEpoch()) : now_(start) {}
  absl::Time Now() override;
  bool WaitUntil(absl::CondVar& cv, absl::Mutex& mu, absl::Time deadline) override;
  // Moves time on and wakes every waiter.
  void Advance(absl::Duration by);
  // Blocks until `n` threads are inside WaitUntil.
  void AwaitWaiters(int n);

 private:
  absl::Mutex mu_;
  absl::Time now_ ABSL_GUARDED_BY(mu_);
  int waiters_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace orrery
