#include "libs/envs/ball_in_cup.h"

#include <cmath>

#include "libs/envs/mujoco_model.h"

namespace orrery {
namespace {

constexpr int kX = 0, kZ = 2;

double& Position(const mjModel& model, mjData& data, const char* joint) {
  return data.qpos[model.jnt_qposadr[FindId(model, mjOBJ_JOINT, joint)]];
}

absl::Status Initialise(mjModel& model, mjData& data, StartRandom& random) {
  return DrawUntilNothingTouches(model, data, [&] {
    Position(model, data, "ball_x") = random.Uniform(-0.2, 0.2);
    Position(model, data, "ball_z") = random.Uniform(0.2, 0.5);
  });
}

// 1 while the whole ball is inside the target, seen from the side.
double Reward(const mjModel& model, const mjData& data) {
  const int target = FindId(model, mjOBJ_SITE, "target");
  const mjtNum* ball_place = data.xpos + 3 * FindId(model, mjOBJ_BODY, "ball");
  const double radius = model.geom_size[3 * FindId(model, mjOBJ_GEOM, "ball")];
  for (const int axis : {kX, kZ}) {
    const double room = model.site_size[3 * target + axis] - radius;
    if (!(std::abs(data.site_xpos[3 * target + axis] - ball_place[axis]) < room)) return 0;
  }
  return 1;
}

std::map<std::string, std::vector<double>> Observe(const mjModel& model, const mjData& data) {
  return {{"position", Positions(model, data)}, {"velocity", Velocities(model, data)}};
}

}  // namespace

std::vector<MujocoTask> BallInCupTasks() {
  return {{.name = "ball_in_cup_catch",
           .xml = "ball_in_cup.xml",
           .control_timestep = 0.02,
           .time_limit = 20,
           .fast_height = 320,  // the string
           .initialise = Initialise,
           .reward = Reward,
           .observe = Observe}};
}

}  // namespace orrery
