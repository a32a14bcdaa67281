// dm_control's suite/pendulum.py.
#pragma once

#include <vector>

#include "libs/envs/mujoco_task.h"

namespace orrery {

// pendulum_swingup.
std::vector<MujocoTask> PendulumTasks();

}  // namespace orrery
