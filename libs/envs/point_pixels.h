// A pixel task without any dependency, for fast tests.
#pragma once

#include <memory>

#include "libs/envs/simulator.h"

namespace orrery {

// A bright disc on a square; two actions move it up to 0.2 of the half-width a step. The reward is near 1 at the dim disc
// in the centre and near 0 away from it; episodes start away from the centre and last 50 steps. "qpos" is the position.
// The task "point_pixels_discrete" chooses between staying and the four directions at full speed instead.
std::unique_ptr<Simulator> MakePointPixels(int image_size);

}  // namespace orrery
