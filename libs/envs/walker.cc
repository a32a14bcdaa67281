#include "libs/envs/walker.h"

#include <functional>
#include <limits>
#include <utility>

#include "libs/envs/mujoco_model.h"
#include "libs/envs/rewards.h"

namespace orrery {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kStandHeight = 1.2;             // metres of the torso
constexpr double kWalkSpeed = 1, kRunSpeed = 8;  // m/s

absl::Status Initialise(mjModel& model, mjData& data, StartRandom& random) {
  RandomiseJoints(model, data, random);
  return absl::OkStatus();
}

double TorsoHeight(const mjModel& model, const mjData& data) {
  return data.xpos[3 * FindId(model, mjOBJ_BODY, "torso") + 2];
}

double StandReward(const mjModel& model, const mjData& data) {
  const double standing = Tolerance(TorsoHeight(model, data), kStandHeight, kInfinity, kStandHeight / 2);
  // The torso's upward axis seen along z.
  const double upright = (1 + data.xmat[9 * FindId(model, mjOBJ_BODY, "torso") + 8]) / 2;
  return (3 * standing + upright) / 4;
}

double MoveReward(const mjModel& model, const mjData& data, double speed) {
  const double moving =
      Tolerance(Sensor(model, data, "torso_subtreelinvel")[0], speed, kInfinity, speed / 2, Sigmoid::kLinear, 0.5);
  return StandReward(model, data) * (5 * moving + 1) / 6;
}

std::map<std::string, std::vector<double>> Observe(const mjModel& model, const mjData& data) {
  std::vector<double> orientations;  // of each body but the world: two entries of its rotation matrix
  for (int body = 1; body < model.nbody; ++body) {
    orientations.insert(orientations.end(), {data.xmat[9 * body], data.xmat[9 * body + 2]});
  }
  return {{"orientations", orientations}, {"height", {TorsoHeight(model, data)}}, {"velocity", Velocities(model, data)}};
}

MujocoTask Task(const char* name, std::function<double(const mjModel&, const mjData&)> reward) {
  return {.name = name,
          .xml = "walker.xml",
          .control_timestep = 0.025,
          .time_limit = 25,
          .initialise = Initialise,
          .reward = std::move(reward),
          .observe = Observe};
}

MujocoTask MoveTask(const char* name, double speed) {
  return Task(name, [speed](const mjModel& model, const mjData& data) { return MoveReward(model, data, speed); });
}

}  // namespace

std::vector<MujocoTask> WalkerTasks() {
  return {MoveTask("walker_run", kRunSpeed), Task("walker_stand", StandReward), MoveTask("walker_walk", kWalkSpeed)};
}

}  // namespace orrery
