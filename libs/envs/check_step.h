// What an environment may deliver.
#pragma once

#include "absl/status/status.h"
#include "libs/envs/environment.h"

namespace orrery {

// OK, or INTERNAL naming what does not fit the specification: an observation that is missing, unknown or of another dtype or
// shape, or a number (reward or observation) that is not finite.
absl::Status CheckStep(const EnvironmentSpec& spec, const TimeStep& step);

}  // namespace orrery
