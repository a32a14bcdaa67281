#include "libs/base/clock.h"

#include "absl/time/clock.h"

namespace orrery {
namespace {
class RealClock : public Clock {
 public:
  absl::Time Now() override { return absl::Now(); }
  bool WaitUntil(absl::CondVar& cv, absl::Mutex& mu, absl::Time deadline) override {
    return cv.WaitWithDeadline(&mu, deadline);
  }
};
}  // namespace

Clock& Clock::Real() {
  static RealClock clock;
  return clock;
}

absl::Time FakeClock::Now() {
  absl::MutexLock lock(&mu_);
  return now_;
}

bool FakeClock::WaitUntil(absl::CondVar& cv, absl::Mutex& mu, absl::Time deadline) {
  {
    absl::MutexLock lock(&mu_);
    if (now_ >= deadline) return true;
    ++waiters_;
  }
  // A short real wait bounds how late a change of fake time is noticed; it decides nothing.
  cv.WaitWithTimeout(&mu, absl::Milliseconds(1));
  absl::MutexLock lock(&mu_);
  --waiters_;
  return now_ >= deadline;
}

void FakeClock::Advance(absl::Duration by) {
  absl::MutexLock lock(&mu_);
  now_ += by;
}

void FakeClock::AwaitWaiters(int n) {
  absl::MutexLock lock(&mu_);
  auto enough = [this, n]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return waiters_ >= n; };
  mu_.Await(absl::Condition(&enough));
}

}  // namespace orrery
