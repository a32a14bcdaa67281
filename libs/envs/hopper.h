// dm_control's suite/hopper.py.
#pragma once

#include <vector>

#include "libs/envs/mujoco_task.h"

namespace orrery {

// hopper_hop and hopper_stand.
std::vector<MujocoTask> HopperTasks();

}  // namespace orrery
