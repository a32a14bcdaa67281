#include "libs/envs/pendulum.h"

#include <cmath>

#include "libs/envs/mujoco_model.h"
#include "libs/envs/rewards.h"

namespace orrery {
namespace {

constexpr double kUprightAngle = 8 * (M_PI / 180);

// Entries of the pole's rotation matrix: its upward axis seen along z and x.
const mjtNum* PoleRotation(const mjModel& model, const mjData& data) {
  return data.xmat + 9 * FindId(model, mjOBJ_BODY, "pole");
}
double PoleCosine(const mjModel& model, const mjData& data) { return PoleRotation(model, data)[8]; }
double PoleSine(const mjModel& model, const mjData& data) { return PoleRotation(model, data)[2]; }

absl::Status Initialise(mjModel&, mjData& data, StartRandom& random) {
  data.qpos[0] = random.Uniform(-M_PI, M_PI);
  return absl::OkStatus();
}

double Reward(const mjModel& model, const mjData& data) {
  return Tolerance(PoleCosine(model, data), std::cos(kUprightAngle), 1, 0);
}

std::map<std::string, std::vector<double>> Observe(const mjModel& model, const mjData& data) {
  return {{"orientation", {PoleCosine(model, data), PoleSine(model, data)}}, {"velocity", Velocities(model, data)}};
}

}  // namespace

std::vector<MujocoTask> PendulumTasks() {
  return {{.name = "pendulum_swingup",
           .xml = "pendulum.xml",
           .time_limit = 20,
           .initialise = Initialise,
           .reward = Reward,
           .observe = Observe}};
}

}  // namespace orrery
