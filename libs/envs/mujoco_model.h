// What several tasks need of MuJoCo's structures: things by name, steps, and random starts.
#pragma once

#include <mujoco/mujoco.h>

#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "libs/envs/start_random.h"

namespace orrery {

// Number of the thing of that name. Throws std::runtime_error that names it if the model has none: MakeMujocoSimulator tries
// each task's functions once, so that a file without it is refused there.
int FindId(const mjModel& model, mjtObj type, const char* name);

// What the sensor of that name measured. Throws as FindId.
absl::Span<const double> Sensor(const mjModel& model, const mjData& data, const char* name);

// qpos from number `first` on, and qvel.
std::vector<double> Positions(const mjModel& model, const mjData& data, int first = 0);
std::vector<double> Velocities(const mjModel& model, const mjData& data);

// dm_control's step of `substeps` of the model's own ("legacy step"): takes everything that depends on position and velocity
// to be up to date, and leaves it so.
void StepModel(const mjModel& model, mjData& data, int substeps);

// Computes everything that follows from the state, with the actuators off. `model` is changed during the call and restored.
void ForwardWithoutActuation(mjModel& model, mjData& data);

// Hinges and slides with limits: uniform within them; other hinges: uniform in [-π, π); other slides: left as they are.
void RandomiseJoints(const mjModel& model, mjData& data, StartRandom& random);

// Calls `draw`, which sets a start in `data`, until nothing touches. OUT_OF_RANGE after 1000 starts with contacts.
absl::Status DrawUntilNothingTouches(mjModel& model, mjData& data, absl::FunctionRef<void()> draw);

}  // namespace orrery
