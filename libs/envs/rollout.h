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
  Array action;               // [T, A] in the task's own units
  std::optional<Array> qpos;  // [nq]; with neither: the start of Reset(seed); with one: the other is the model's default
  std::optional<Array> qvel;  // [nv]
  uint64_t seed = 0;
};

// Plays the actions without repeat, cutting or time limit. Returns float64 "reward" [T], "qpos" [T+1, nq], "qvel"
// [T+1, nv] (MuJoCo tasks) and the task's vector observations [T+1, n] (cartpole: "position", "velocity"), and uint8
// "image" [T+1, 64, 64, 3]. INVALID_ARGUMENT names the array that does not fit; MakeEnvironment's errors.
absl::StatusOr<ArrayMap> Rollout(const std::string& task, const RolloutInput& input,
                                 EnvironmentOptions::Quality quality);

}  // namespace orrery
