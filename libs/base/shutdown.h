// SIGINT and SIGTERM as an event that threads wait for.
#pragma once

#include "absl/time/time.h"

namespace orrery {

// Blocks SIGINT and SIGTERM in this thread and those it starts, and ignores SIGPIPE. Call once, first in main.
void BlockShutdownSignals();
// Waits for one of the two; returns its number, or 0 when `timeout` passed first. One thread at a time.
int WaitForShutdownSignal(absl::Duration timeout = absl::InfiniteDuration());

}  // namespace orrery
