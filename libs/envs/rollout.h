// A fixed sequence of actions played step by step, so that another implementation can check every number.
#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "libs/base/array.h"
#include "libs/envs/environment.h"

namespace orrery {

// Numbers are float32 or float64.
struct RolloutInput {
  Array action;  // [T, A] in the task's own units
  // The start; with none of the three: that of Reset(seed); with any: the others are the model's default.
  std::optional<Array> qpos;    // [nq]
  std::optional<Array> qvel;    // [nv]
  std::optional<Array> target;  // [2], reacher_easy only: the target's place in metres, dm_control's geom_pos["target", :2]
  uint64_t seed = 0;
};

// Plays the actions without repeat, cutting or time limit. Returns uint8 "image" [T+1, 64, 64, 3] and float64: "reward" [T],
// "qpos" [T+1, nq], "qvel" [T+1, nv] (MuJoCo tasks), "target" [T+1, 2] (reacher) and the task's vector observations [T+1, n],
// named as dm_control's:
//   ball_in_cup  position 4, velocity 4                 pendulum  orientation 2, velocity 1
//   cartpole     position 3, velocity 2                 reacher   position 2, to_target 2, velocity 2
//   cheetah      position 8, velocity 9                 walker    orientations 14, height 1, velocity 9
//   finger       position 4, velocity 3, touch 2
//   hopper       position 6, velocity 7, touch 2
// But for a target, all of it follows from actions, qpos and qvel: what else dm_control's reset changes in a model (finger's
// damping and hidden sites, the size of reacher's target) is in the simulator from the beginning.
// INVALID_ARGUMENT names the array that does not fit; MakeEnvironment's errors.
absl::StatusOr<ArrayMap> Rollout(const std::string& task, const RolloutInput& input,
                                 EnvironmentOptions::Quality quality);

}  // namespace orrery
