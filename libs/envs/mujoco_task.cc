#include "libs/envs/mujoco_task.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <utility>

#include "absl/base/call_once.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/envs/mujoco_model.h"
#include "libs/envs/renderer.h"

namespace orrery {
namespace {

constexpr int kCamera = 0;      // as in PlaNet
constexpr int kTargetSize = 2;  // x, y

using ModelPtr = std::unique_ptr<mjModel, decltype(&mj_deleteModel)>;
using DataPtr = std::unique_ptr<mjData, decltype(&mj_deleteData)>;

// MuJoCo's own handlers write to a file in the working folder, and an error ends the process.
void InstallMujocoHandlers() {
  static absl::once_flag once;
  absl::call_once(once, [] {
    mju_user_warning = [](const char* message) { LogWarning("mujoco: {}", message); };
    mju_user_error = [](const char* message) { throw std::runtime_error(message); };
  });
}

absl::StatusOr<ModelPtr> LoadModel(const std::string& xml) {
  const char* folder = std::getenv("ORRERY_SUITE");
  const std::string path = absl::StrCat(folder != nullptr ? folder : ORRERY_SUITE_DIR, "/", xml);
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) {
    return absl::NotFoundError(absl::StrCat("task file ", path, " does not exist: run tools/setup.sh, or set ORRERY_SUITE ",
                                            "to the folder dm_control/suite"));
  }
  char error[1000] = "";
  ModelPtr model(mj_loadXML(path.c_str(), nullptr, error, sizeof(error)), &mj_deleteModel);
  if (model == nullptr) {
    // A file that it includes is missing, or one of them is damaged.
    const auto code = absl::StrContains(error, "Error opening file") ? absl::StatusCode::kNotFound
                                                                     : absl::StatusCode::kFailedPrecondition;
    return absl::Status(code, absl::StrCat("MuJoCo cannot read ", path, " (tools/setup.sh installs it): ", error));
  }
  return model;
}

// Runs `f`, which computes on `data` and returns a status; OUT_OF_RANGE if MuJoCo warned of a state it cannot simulate (it
// then resets the state by itself).
template <typename F>
absl::Status Simulate(const MujocoTask& task, mjData& data, F&& f) {
  for (mjWarningStat& warning : data.warning) warning.number = 0;
  RETURN_IF_ERROR(Annotate(CatchExceptions("MuJoCo", f), task.name));
  for (int i = 0; i < mjNWARNING; ++i) {
    if (data.warning[i].number > 0) {
      return absl::OutOfRangeError(absl::StrCat(task.name, " cannot be simulated further: ",
                                                mju_warningText(i, data.warning[i].lastinfo)));
    }
  }
  return absl::OkStatus();
}

// One step of `substeps` of the model's own; returns its reward.
absl::StatusOr<double> StepTask(const MujocoTask& task, int substeps, const mjModel& model, mjData& data,
                                absl::Span<const double> action) {
  mju_copy(data.ctrl, action.data(), model.nu);
  RETURN_IF_ERROR(Simulate(task, data, [&] {
    StepModel(model, data, substeps);
    return absl::OkStatus();
  }));
  return task.reward(model, data);
}

// All of `original`'s data is copied, not the physical state alone: what the next step starts from (the solver's warm start,
// and with some integrators the results of the last mj_step1) is then the same without a computation.
class MujocoCopy : public SimulatorCopy {
 public:
  MujocoCopy(const MujocoTask& task, int substeps, const mjModel& model, const mjData& original)
      : task_(task),
        substeps_(substeps),
        model_(model),
        original_(original),
        data_(mj_makeData(&model), &mj_deleteData) {}

  absl::Status Restart() override {
    return CatchExceptions(task_.name, [this] {
      mj_copyData(data_.get(), &model_, &original_);
      return absl::OkStatus();
    });
  }

  absl::StatusOr<double> Step(absl::Span<const double> action) override {
    return StepTask(task_, substeps_, model_, *data_, action);
  }

 private:
  // The simulator's own.
  const MujocoTask& task_;
  const int substeps_;
  const mjModel& model_;
  const mjData& original_;

  const DataPtr data_;
};

class MujocoSimulator : public Simulator {
 public:
  MujocoSimulator(const MujocoTask& task, ModelPtr model, int image_size, EnvironmentOptions::Quality quality)
      : task_(task),
        image_size_(image_size),
        quality_(quality),
        substeps_(task.control_timestep > 0 ? static_cast<int>(std::lround(task.control_timestep / model->opt.timestep)) : 1),
        model_(std::move(model)),
        data_(mj_makeData(model_.get()), &mj_deleteData),
        target_(task.target.empty() ? nullptr
                                    : model_->geom_pos + 3 * FindId(*model_, mjOBJ_GEOM, task.target.c_str())) {
    if (task.prepare) task.prepare(*model_);
    if (target_ != nullptr) mju_copy(default_target_, target_, kTargetSize);
    // What the model lacks is noticed here rather than during an episode.
    task.reward(*model_, *data_);
    task.observe(*model_, *data_);
    for (int i = 0; i < model_->nu; ++i) {
      const mjtNum* range = model_->actuator_ctrlrange + 2 * i;
      range_.emplace_back(range[0], range[1]);
    }
  }

  const std::vector<std::pair<double, double>>& action_range() const override { return range_; }
  // dm_control's episodes end when their steps reach this quotient: the same arithmetic, so the same number.
  int time_limit() const override {
    return static_cast<int>(std::ceil(task_.time_limit / (model_->opt.timestep * substeps_)));
  }

  absl::Status Reset(uint64_t seed) override {
    return ResetWith([&] {
      StartRandom random(seed);
      return task_.initialise(*model_, *data_, random);
    });
  }

  absl::Status ResetTo(const SimulatorStart& start) override {
    if (start.qpos.has_value()) RETURN_IF_ERROR(CheckNumbers(*start.qpos, model_->nq, "qpos"));
    if (start.qvel.has_value()) RETURN_IF_ERROR(CheckNumbers(*start.qvel, model_->nv, "qvel"));
    if (start.target.has_value()) {
      if (target_ == nullptr) {
        return absl::InvalidArgumentError(absl::StrCat("target is given, but ", task_.name, " has none to place"));
      }
      RETURN_IF_ERROR(CheckNumbers(*start.target, kTargetSize, "target"));
    }
    return ResetWith([&] {
      if (target_ != nullptr) mju_copy(target_, start.target.has_value() ? start.target->data() : default_target_, kTargetSize);
      if (start.qpos.has_value()) mju_copy(data_->qpos, start.qpos->data(), model_->nq);
      if (start.qvel.has_value()) mju_copy(data_->qvel, start.qvel->data(), model_->nv);
      return absl::OkStatus();
    });
  }

  absl::StatusOr<double> Step(absl::Span<const double> action) override {
    return StepTask(task_, substeps_, *model_, *data_, action);
  }

  ArrayMap State() const override {
    ArrayMap state;
    for (const auto& [name, values] : task_.observe(*model_, *data_)) {
      state[name] = Array::From<double>(values, {static_cast<int64_t>(values.size())});
    }
    state["qpos"] = Array::From<double>(absl::MakeSpan(data_->qpos, model_->nq), {model_->nq});
    state["qvel"] = Array::From<double>(absl::MakeSpan(data_->qvel, model_->nv), {model_->nv});
    if (target_ != nullptr) state["target"] = Array::From<double>(absl::MakeSpan(target_, kTargetSize), {kTargetSize});
    return state;
  }

  absl::StatusOr<Array> Image() override {
    if (quality_ == EnvironmentOptions::Quality::kReference) return Render(image_size_, image_size_);
    if (fast_renderer_ == nullptr) {
      const int scale = std::max(Renderer::kFastScale, (task_.fast_height + image_size_ - 1) / image_size_);
      ASSIGN_OR_RETURN(fast_renderer_, Renderer::Create(*model_, image_size_, image_size_, quality_, scale));
    }
    return fast_renderer_->Draw(*model_, *data_, kCamera, image_size_, image_size_);
  }

  absl::StatusOr<Array> Render(int height, int width) override {
    if (renderer_ == nullptr) {
      // The buffer has the model's own size, as dm_control's.
      const auto& buffer = model_->vis.global;
      ASSIGN_OR_RETURN(renderer_, Renderer::Create(*model_, buffer.offheight, buffer.offwidth,
                                                   EnvironmentOptions::Quality::kReference));
    }
    return renderer_->Draw(*model_, *data_, kCamera, height, width);
  }

  absl::StatusOr<std::unique_ptr<SimulatorCopy>> MakeCopy() const override {
    return CatchExceptions(task_.name, [this]() -> absl::StatusOr<std::unique_ptr<SimulatorCopy>> {
      return std::make_unique<MujocoCopy>(task_, substeps_, *model_, *data_);
    });
  }

 private:
  // dm_control's reset: forward without actuation before and after the start is set.
  template <typename F>
  absl::Status ResetWith(F&& set_start) {
    return Simulate(task_, *data_, [&] {
      mj_resetData(model_.get(), data_.get());
      ForwardWithoutActuation(*model_, *data_);
      const absl::Status status = set_start();
      ForwardWithoutActuation(*model_, *data_);
      return status;
    });
  }

  // Constant after construction.
  const MujocoTask task_;
  const int image_size_;
  const EnvironmentOptions::Quality quality_;
  const int substeps_;
  std::vector<std::pair<double, double>> range_;

  const ModelPtr model_;
  const DataPtr data_;
  mjtNum* const target_;                     // in `model_`; null: the task has none
  mjtNum default_target_[kTargetSize] = {};  // the model's own
  std::unique_ptr<Renderer> renderer_;       // reference quality; made at its first picture
  std::unique_ptr<Renderer> fast_renderer_;  // made at its first picture
};

}  // namespace

absl::StatusOr<std::unique_ptr<Simulator>> MakeMujocoSimulator(const MujocoTask& task, int image_size,
                                                               EnvironmentOptions::Quality quality) {
  InstallMujocoHandlers();
  return CatchExceptions(task.name, [&]() -> absl::StatusOr<std::unique_ptr<Simulator>> {
    ASSIGN_OR_RETURN(ModelPtr model, LoadModel(task.xml));
    std::unique_ptr<Simulator> simulator;
    const absl::Status fits = CatchExceptions(task.xml, [&] {
      simulator = std::make_unique<MujocoSimulator>(task, std::move(model), image_size, quality);
      return absl::OkStatus();
    });
    if (!fits.ok()) return absl::FailedPreconditionError(absl::StrCat(task.name, ": ", fits.message()));
    return simulator;
  });
}

}  // namespace orrery
