#include "libs/envs/cartpole.h"

#include <cmath>

#include "libs/envs/mujoco_model.h"
#include "libs/envs/rewards.h"

namespace orrery {
namespace {

// Entries of the pole's rotation matrix: its upward axis seen along z and x.
const mjtNum* PoleRotation(const mjModel& model, const mjData& data) {
  return data.xmat + 9 * FindId(model, mjOBJ_BODY, "pole_1");
}
double PoleCosine(const mjModel& model, const mjData& data) { return PoleRotation(model, data)[8]; }
double PoleSine(const mjModel& model, const mjData& data) { return PoleRotation(model, data)[2]; }

absl::Status Initialise(const mjModel& model, mjData& data, StartRandom& random, bool swing_up) {
  if (swing_up) {
    data.qpos[0] = 0.01 * random.Normal();
    data.qpos[1] = M_PI + 0.01 * random.Normal();
  } else {
    data.qpos[0] = random.Uniform(-0.1, 0.1);
    data.qpos[1] = random.Uniform(-0.034, 0.034);
  }
  for (int i = 0; i < model.nv; ++i) data.qvel[i] = 0.01 * random.Normal();
  return absl::OkStatus();
}

double Reward(const mjModel& model, const mjData& data) {
  const double upright = (PoleCosine(model, data) + 1) / 2;
  const double centered = (1 + Tolerance(data.qpos[0], 0, 0, 2)) / 2;
  const double small_control = (4 + Tolerance(data.ctrl[0], 0, 0, 1, Sigmoid::kQuadratic, 0)) / 5;
  const double small_velocity = (1 + Tolerance(data.qvel[1], 0, 0, 5)) / 2;
  return upright * small_control * small_velocity * centered;
}

std::map<std::string, std::vector<double>> Observe(const mjModel& model, const mjData& data) {
  return {{"position", {data.qpos[0], PoleCosine(model, data), PoleSine(model, data)}}, {"velocity", Velocities(model, data)}};
}

MujocoTask Task(const char* name, bool swing_up) {
  return {.name = name,
          .xml = "cartpole.xml",
          .initialise = [swing_up](mjModel& model, mjData& data,
                                   StartRandom& random) { return Initialise(model, data, random, swing_up); },
          .reward = Reward,
          .observe = Observe};
}

}  // namespace

std::vector<MujocoTask> CartpoleTasks() { return {Task("cartpole_balance", false), Task("cartpole_swingup", true)}; }

}  // namespace orrery
