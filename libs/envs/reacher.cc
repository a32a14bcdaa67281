#include "libs/envs/reacher.h"

#include <array>
#include <cmath>

#include "libs/envs/mujoco_model.h"
#include "libs/envs/rewards.h"

namespace orrery {
namespace {

constexpr double kBigTarget = 0.05;  // radius in metres

int Target(const mjModel& model) { return FindId(model, mjOBJ_GEOM, "target"); }
int Finger(const mjModel& model) { return FindId(model, mjOBJ_GEOM, "finger"); }

void Prepare(mjModel& model) { model.geom_size[3 * Target(model)] = kBigTarget; }

absl::Status Initialise(mjModel& model, mjData& data, StartRandom& random) {
  RandomiseJoints(model, data, random);
  const double angle = random.Uniform(0, 2 * M_PI);
  const double radius = random.Uniform(0.05, 0.2);
  mjtNum* place = model.geom_pos + 3 * Target(model);
  place[0] = radius * std::sin(angle);
  place[1] = radius * std::cos(angle);
  return absl::OkStatus();
}

// x and y.
std::array<double, 2> FingerToTarget(const mjModel& model, const mjData& data) {
  const mjtNum* target = data.geom_xpos + 3 * Target(model);
  const mjtNum* finger = data.geom_xpos + 3 * Finger(model);
  return {target[0] - finger[0], target[1] - finger[1]};
}

double Reward(const mjModel& model, const mjData& data) {
  const auto [x, y] = FingerToTarget(model, data);
  const double radii = model.geom_size[3 * Target(model)] + model.geom_size[3 * Finger(model)];
  return Tolerance(std::hypot(x, y), 0, radii, 0);
}

std::map<std::string, std::vector<double>> Observe(const mjModel& model, const mjData& data) {
  const auto to_target = FingerToTarget(model, data);
  return {{"position", Positions(model, data)},
          {"to_target", {to_target[0], to_target[1]}},
          {"velocity", Velocities(model, data)}};
}

}  // namespace

std::vector<MujocoTask> ReacherTasks() {
  return {{.name = "reacher_easy",
           .xml = "reacher.xml",
           .time_limit = 20,
           .target = "target",
           .prepare = Prepare,
           .initialise = Initialise,
           .reward = Reward,
           .observe = Observe}};
}

}  // namespace orrery
