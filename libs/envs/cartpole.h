// dm_control's suite/cartpole.py.
#pragma once

#include <vector>

#include "libs/envs/mujoco_task.h"

namespace orrery {

// cartpole_balance and cartpole_swingup.
std::vector<MujocoTask> CartpoleTasks();

}  // namespace orrery
