// Wakes threads that wait for "something happened" without saying what.
#pragma once

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace orrery {

// Read rings(), look whether there is something to do, and if not Await that number: no ring in between is missed.
// Thread-safe.
class Bell {
 public:
  int64_t rings() const {
    absl::MutexLock lock(&mu_);
    return rings_;
  }
  void Ring() {
    absl::MutexLock lock(&mu_);
    ++rings_;
    rung_.SignalAll();
  }
  // Waits for a ring after the first `seen` or until `until`; false when stopped.
  bool Await(int64_t seen, absl::Time until) {
    absl::MutexLock lock(&mu_);
    while (!stopped_ && rings_ == seen && absl::Now() < until) rung_.WaitWithDeadline(&mu_, until);
    return !stopped_;
  }
  // Waits until `until`, whatever rings; false when stopped.
  bool Sleep(absl::Time until) {
    absl::MutexLock lock(&mu_);
    while (!stopped_ && absl::Now() < until) rung_.WaitWithDeadline(&mu_, until);
    return !stopped_;
  }
  // Wakes every waiter, for good.
  void Stop() {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
    rung_.SignalAll();
  }
  bool stopped() const {
    absl::MutexLock lock(&mu_);
    return stopped_;
  }

 private:
  mutable absl::Mutex mu_;
  absl::CondVar rung_;
  int64_t rings_ ABSL_GUARDED_BY(mu_) = 0;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace orrery
