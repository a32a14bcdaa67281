#include "libs/envs/environment.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/envs/cartpole.h"
#include "libs/envs/mujoco_task.h"
#include "libs/envs/point_pixels.h"
#include "libs/envs/simulator.h"

namespace orrery {
namespace {

constexpr char kPointPixels[] = "point_pixels";

// Every MuJoCo task: a domain's tasks are added here.
std::vector<MujocoTask> MujocoTasks() { return CartpoleTasks(); }

}  // namespace

uint64_t Hash(const EnvironmentSpec& spec) {
  std::string text = absl::StrCat(spec.action.discrete ? "discrete " : "continuous ", spec.action.size);
  for (const TensorSpec& tensor : spec.observations) {
    // The length first, so that no name can imitate the end of a field.
    absl::StrAppend(&text, ";", tensor.name.size(), ":", tensor.name, " ", Name(tensor.dtype), ShapeString(tensor.shape));
  }
  return DeriveSeed(0, text);
}

std::vector<std::string> KnownTasks() {
  std::vector<std::string> names;
  for (const MujocoTask& task : MujocoTasks()) names.push_back(task.name);
  names.push_back(kPointPixels);
  return names;
}

absl::StatusOr<std::unique_ptr<Simulator>> MakeSimulator(const std::string& task, int image_size,
                                                         EnvironmentOptions::Quality quality) {
  if (image_size != 32 && image_size != 64) {
    return absl::InvalidArgumentError(absl::StrCat("image_size is ", image_size, ", expected 32 or 64"));
  }
  if (task == kPointPixels) return MakePointPixels(image_size);
  for (const MujocoTask& candidate : MujocoTasks()) {
    if (candidate.name == task) return MakeMujocoSimulator(candidate, image_size, quality);
  }
  return absl::NotFoundError(
      absl::StrCat("unknown task \"", task, "\", expected one of: ", absl::StrJoin(KnownTasks(), ", ")));
}

EnvironmentOptions ToEnvironmentOptions(const config::v1::Environment& environment) {
  EnvironmentOptions options;
  options.task = environment.task();
  options.action_repeat = environment.action_repeat();
  options.image_size = environment.image_size();
  options.quality = environment.quality() == config::v1::Environment::REFERENCE ? EnvironmentOptions::Quality::kReference
                                                                                : EnvironmentOptions::Quality::kFast;
  options.time_limit = environment.time_limit();
  return options;
}

absl::StatusOr<std::unique_ptr<Environment>> MakeEnvironment(const EnvironmentOptions& options) {
  if (options.action_repeat < 1) {
    return absl::InvalidArgumentError(absl::StrCat("action_repeat is ", options.action_repeat, ", expected at least 1"));
  }
  if (options.time_limit < 0) {
    return absl::InvalidArgumentError(absl::StrCat("time_limit is ", options.time_limit, ", expected at least 0"));
  }
  ASSIGN_OR_RETURN(auto simulator, MakeSimulator(options.task, options.image_size, options.quality));
  return MakeSimulatorEnvironment(std::move(simulator), options.image_size, options.action_repeat, options.time_limit);
}

}  // namespace orrery
