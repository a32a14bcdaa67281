// dm_control's suite/reacher.py.
#pragma once

#include <vector>

#include "libs/envs/mujoco_task.h"

namespace orrery {

// reacher_easy.
std::vector<MujocoTask> ReacherTasks();

}  // namespace orrery
