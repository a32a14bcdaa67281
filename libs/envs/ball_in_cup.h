// dm_control's suite/ball_in_cup.py.
#pragma once

#include <vector>

#include "libs/envs/mujoco_task.h"

namespace orrery {

// ball_in_cup_catch.
std::vector<MujocoTask> BallInCupTasks();

}  // namespace orrery
