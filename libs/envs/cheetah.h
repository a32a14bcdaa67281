// dm_control's suite/cheetah.py.
#pragma once

#include <vector>

#include "libs/envs/mujoco_task.h"

namespace orrery {

// cheetah_run.
std::vector<MujocoTask> CheetahTasks();

}  // namespace orrery
