#include "libs/envs/mujoco_model.h"

#include <cmath>
#include <stdexcept>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace orrery {

int FindId(const mjModel& model, mjtObj type, const char* name) {
  const int id = mj_name2id(&model, type, name);
  if (id < 0) throw std::runtime_error(absl::StrCat("the model has no ", mju_type2Str(type), " \"", name, "\""));
  return id;
}

absl::Span<const double> Sensor(const mjModel& model, const mjData& data, const char* name) {
  const int id = FindId(model, mjOBJ_SENSOR, name);
  return {data.sensordata + model.sensor_adr[id], static_cast<size_t>(model.sensor_dim[id])};
}

std::vector<double> Positions(const mjModel& model, const mjData& data, int first) {
  return {data.qpos + first, data.qpos + model.nq};
}

std::vector<double> Velocities(const mjModel& model, const mjData& data) { return {data.qvel, data.qvel + model.nv}; }

void StepModel(const mjModel& model, mjData& data, int substeps) {
  if (model.opt.integrator == mjINT_RK4) {
    for (int i = 0; i < substeps; ++i) mj_step(&model, &data);
  } else {
    mj_step2(&model, &data);
    for (int i = 1; i < substeps; ++i) mj_step(&model, &data);
  }
  mj_step1(&model, &data);
}

void ForwardWithoutActuation(mjModel& model, mjData& data) {
  const absl::Cleanup restore = [&model, flags = model.opt.disableflags] { model.opt.disableflags = flags; };
  model.opt.disableflags |= mjDSBL_ACTUATION;
  mj_forward(&model, &data);
}

void RandomiseJoints(const mjModel& model, mjData& data, StartRandom& random) {
  for (int joint = 0; joint < model.njnt; ++joint) {
    const int type = model.jnt_type[joint];
    if (type != mjJNT_HINGE && type != mjJNT_SLIDE) continue;
    double& position = data.qpos[model.jnt_qposadr[joint]];
    if (model.jnt_limited[joint]) {
      position = random.Uniform(model.jnt_range[2 * joint], model.jnt_range[2 * joint + 1]);
    } else if (type == mjJNT_HINGE) {
      position = random.Uniform(-M_PI, M_PI);
    }
  }
}

absl::Status DrawUntilNothingTouches(mjModel& model, mjData& data, absl::FunctionRef<void()> draw) {
  constexpr int kStarts = 1000;
  for (int i = 0; i < kStarts; ++i) {
    draw();
    ForwardWithoutActuation(model, data);
    if (data.ncon == 0) return absl::OkStatus();
  }
  return absl::OutOfRangeError(absl::StrCat("no start without contacts among ", kStarts));
}

}  // namespace orrery
