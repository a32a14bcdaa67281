#include "libs/envs/finger.h"

#include <cmath>

#include "libs/envs/mujoco_model.h"

namespace orrery {
namespace {

constexpr double kSpinVelocity = -15;  // rad/s

// The sites of another task of the same file are not shown; the spinner turns more easily than the file says.
void Prepare(mjModel& model) {
  for (const char* site : {"target", "tip"}) model.site_rgba[4 * FindId(model, mjOBJ_SITE, site) + 3] = 0;
  model.dof_damping[model.jnt_dofadr[FindId(model, mjOBJ_JOINT, "hinge")]] = 0.03;
}

absl::Status Initialise(mjModel& model, mjData& data, StartRandom& random) {
  return DrawUntilNothingTouches(model, data, [&] { RandomiseJoints(model, data, random); });
}

double Reward(const mjModel& model, const mjData& data) {
  return Sensor(model, data, "hinge_velocity")[0] <= kSpinVelocity ? 1 : 0;
}

std::map<std::string, std::vector<double>> Observe(const mjModel& model, const mjData& data) {
  const auto number = [&](const char* sensor) { return Sensor(model, data, sensor)[0]; };
  const auto tip = Sensor(model, data, "tip"), spinner = Sensor(model, data, "spinner");
  return {{"position", {number("proximal"), number("distal"), tip[0] - spinner[0], tip[2] - spinner[2]}},
          {"velocity", {number("proximal_velocity"), number("distal_velocity"), number("hinge_velocity")}},
          {"touch", {std::log1p(number("touchtop")), std::log1p(number("touchbottom"))}}};
}

}  // namespace

std::vector<MujocoTask> FingerTasks() {
  return {{.name = "finger_spin",
           .xml = "finger.xml",
           .control_timestep = 0.02,
           .time_limit = 20,
           .prepare = Prepare,
           .initialise = Initialise,
           .reward = Reward,
           .observe = Observe}};
}

}  // namespace orrery
