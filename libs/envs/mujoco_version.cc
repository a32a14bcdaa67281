#include "libs/envs/mujoco_version.h"

#include <mujoco/mujoco.h>

namespace orrery {

std::string MujocoVersion() { return mj_versionString(); }

}  // namespace orrery
