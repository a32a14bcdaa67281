#include "libs/base/shutdown.h"

#include <pthread.h>
#include <signal.h>

namespace orrery {
namespace {
sigset_t ShutdownSignals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  return set;
}
}  // namespace

void BlockShutdownSignals() {
  const sigset_t set = ShutdownSignals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  signal(SIGPIPE, SIG_IGN);
}

int WaitForShutdownSignal(absl::Duration timeout) {
  const sigset_t set = ShutdownSignals();
  int signal_number = 0;
  if (timeout == absl::InfiniteDuration()) {
    sigwait(&set, &signal_number);
    return signal_number;
  }
  const timespec ts = absl::ToTimespec(timeout < absl::ZeroDuration() ? absl::ZeroDuration() : timeout);
  signal_number = sigtimedwait(&set, nullptr, &ts);
  return signal_number > 0 ? signal_number : 0;
}

}  // namespace orrery
