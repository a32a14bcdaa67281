// Tasks of the DeepMind Control Suite: what one consists of, and the simulator that plays any of them.
#pragma once

#include <mujoco/mujoco.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/envs/simulator.h"
#include "libs/envs/start_random.h"

namespace orrery {

// One task; dm_control's functions of the same meaning, on MuJoCo's own structures. They may throw std::runtime_error for
// something that the model lacks. No task ends before its time limit.
struct MujocoTask {
  std::string name;
  std::string xml;              // file in the suite's folder
  double control_timestep = 0;  // seconds between actions; 0: the model's own timestep
  double time_limit = 10;       // seconds
  // Geom whose x and y in its body's frame belong to an episode's start ("target" in RolloutInput and State). Empty: none.
  std::string target;
  // Fast pictures are drawn at least this many pixels high before they are averaged down, so that no pixel is wider than the
  // task's thinnest part. 0: the renderer's usual scale is enough.
  int fast_height = 0;
  // Changes the model after it was read. Unset: as it is.
  std::function<void(mjModel&)> prepare;
  // Sets the start in freshly reset data, and places the target.
  std::function<absl::Status(mjModel&, mjData&, StartRandom&)> initialise;
  // The reward of the present state and control.
  std::function<double(const mjModel&, const mjData&)> reward;
  // The task's vector observations by name.
  std::function<std::map<std::string, std::vector<double>>(const mjModel&, const mjData&)> observe;
};

// A simulator that steps, renders and rewards as dm_control 1.0.50 does. The XML is read from the folder ORRERY_SUITE
// (environment variable; else the one given at build time). NOT_FOUND if it is not there, FAILED_PRECONDITION if MuJoCo
// cannot read it or it lacks something that the task needs.
absl::StatusOr<std::unique_ptr<Simulator>> MakeMujocoSimulator(const MujocoTask& task, int image_size,
                                                               EnvironmentOptions::Quality quality);

}  // namespace orrery
