#include "libs/envs/hopper.h"

#include <cmath>
#include <limits>

#include "libs/envs/mujoco_model.h"
#include "libs/envs/rewards.h"

namespace orrery {
namespace {

constexpr double kStandHeight = 0.6, kMostHeight = 2;  // metres of the torso above the foot
constexpr double kHopSpeed = 2;                        // m/s

absl::Status Initialise(mjModel& model, mjData& data, StartRandom& random) {
  RandomiseJoints(model, data, random);
  return absl::OkStatus();
}

double Standing(const mjModel& model, const mjData& data) {
  const auto height = [&](const char* body) { return data.xipos[3 * FindId(model, mjOBJ_BODY, body) + 2]; };
  return Tolerance(height("torso") - height("foot"), kStandHeight, kMostHeight, 0);
}

double HopReward(const mjModel& model, const mjData& data) {
  return Standing(model, data) * Tolerance(Sensor(model, data, "torso_subtreelinvel")[0], kHopSpeed,
                                           std::numeric_limits<double>::infinity(), kHopSpeed / 2, Sigmoid::kLinear, 0.5);
}

double StandReward(const mjModel& model, const mjData& data) {
  double small_control = 0;
  for (int i = 0; i < model.nu; ++i) small_control += Tolerance(data.ctrl[i], 0, 0, 1, Sigmoid::kQuadratic, 0);
  return Standing(model, data) * (small_control / static_cast<double>(model.nu) + 4) / 5;
}

// Without the place along the track.
std::map<std::string, std::vector<double>> Observe(const mjModel& model, const mjData& data) {
  return {{"position", Positions(model, data, 1)},
          {"velocity", Velocities(model, data)},
          {"touch",
           {std::log1p(Sensor(model, data, "touch_toe")[0]), std::log1p(Sensor(model, data, "touch_heel")[0])}}};
}

MujocoTask Task(const char* name, double (*reward)(const mjModel&, const mjData&)) {
  return {.name = name,
          .xml = "hopper.xml",
          .control_timestep = 0.02,
          .time_limit = 20,
          .initialise = Initialise,
          .reward = reward,
          .observe = Observe};
}

}  // namespace

std::vector<MujocoTask> HopperTasks() { return {Task("hopper_hop", HopReward), Task("hopper_stand", StandReward)}; }

}  // namespace orrery
