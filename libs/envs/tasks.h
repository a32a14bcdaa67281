// Several tasks that one agent plays.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "libs/envs/environment.h"
#include "orrery/config/v1/experiment.pb.h"

namespace orrery {

// How each task of the configuration is made, in its order. Several tasks are each made once by `make`, to see that one agent
// can play them all; continuous actions are then padded to the largest. INVALID_ARGUMENT names a task that does not fit the
// first one; errors of `make` name the task.
absl::StatusOr<std::vector<EnvironmentOptions>> TaskOptions(const config::v1::Environment& environment,
                                                            const EnvironmentMaker& make = MakeEnvironment);

}  // namespace orrery
