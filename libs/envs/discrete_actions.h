// A choice between fixed actions, in place of a continuous action.
#pragma once

#include <memory>
#include <vector>

#include "libs/envs/environment.h"

namespace orrery {

// `environment` with a discrete action: choice i plays `choices[i]`, each as long as the environment's own action. An action
// that is not one-hot is INVALID_ARGUMENT. It looks ahead where the environment does.
std::unique_ptr<Environment> MakeDiscreteActions(std::unique_ptr<Environment> environment,
                                                 std::vector<std::vector<float>> choices);

}  // namespace orrery
