// dm_control's suite/walker.py.
#pragma once

#include <vector>

#include "libs/envs/mujoco_task.h"

namespace orrery {

// walker_run, walker_stand and walker_walk.
std::vector<MujocoTask> WalkerTasks();

}  // namespace orrery
