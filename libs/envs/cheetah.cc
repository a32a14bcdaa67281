#include "libs/envs/cheetah.h"

#include <limits>

#include "libs/envs/mujoco_model.h"
#include "libs/envs/rewards.h"

namespace orrery {
namespace {

constexpr double kFullSpeed = 10;  // m/s
constexpr int kSettlingSteps = 200;

absl::Status Initialise(mjModel& model, mjData& data, StartRandom& random) {
  for (int joint = 0; joint < model.njnt; ++joint) {
    if (!model.jnt_limited[joint]) continue;
    const mjtNum* range = model.jnt_range + 2 * joint;
    data.qpos[model.jnt_qposadr[joint]] = random.Uniform(range[0], range[1]);
  }
  // The first of these steps still uses what followed from the file's posture, as dm_control's does.
  StepModel(model, data, kSettlingSteps);
  data.time = 0;
  return absl::OkStatus();
}

double Reward(const mjModel& model, const mjData& data) {
  return Tolerance(Sensor(model, data, "torso_subtreelinvel")[0], kFullSpeed, std::numeric_limits<double>::infinity(),
                   kFullSpeed, Sigmoid::kLinear, 0);
}

// Without the place along the track.
std::map<std::string, std::vector<double>> Observe(const mjModel& model, const mjData& data) {
  return {{"position", Positions(model, data, 1)}, {"velocity", Velocities(model, data)}};
}

}  // namespace

std::vector<MujocoTask> CheetahTasks() {
  return {{.name = "cheetah_run", .xml = "cheetah.xml", .initialise = Initialise, .reward = Reward, .observe = Observe}};
}

}  // namespace orrery
