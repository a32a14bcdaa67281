// dm_control's suite/finger.py.
#pragma once

#include <vector>

#include "libs/envs/mujoco_task.h"

namespace orrery {

// finger_spin.
std::vector<MujocoTask> FingerTasks();

}  // namespace orrery
