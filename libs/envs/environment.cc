#include "libs/envs/environment.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/base/const_init.h"
#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/envs/ball_in_cup.h"
#include "libs/envs/cartpole.h"
#include "libs/envs/cheetah.h"
#include "libs/envs/discrete_actions.h"
#include "libs/envs/finger.h"
#include "libs/envs/hopper.h"
#include "libs/envs/mujoco_task.h"
#include "libs/envs/pendulum.h"
#include "libs/envs/point_pixels.h"
#include "libs/envs/reacher.h"
#include "libs/envs/simulator.h"
#include "libs/envs/walker.h"

namespace orrery {
namespace {

constexpr char kPointPixels[] = "point_pixels";
constexpr char kPointPixelsDiscrete[] = "point_pixels_discrete";
constexpr int kLeastImageSize = 32, kMostImageSize = 128;

// Every MuJoCo task: a domain's tasks are added here.
std::vector<MujocoTask> MujocoTasks() {
  std::vector<MujocoTask> all;
  for (const auto domain : {BallInCupTasks, CartpoleTasks, CheetahTasks, FingerTasks, HopperTasks, PendulumTasks, ReacherTasks,
                            WalkerTasks}) {
    for (MujocoTask& task : domain()) all.push_back(std::move(task));
  }
  return all;
}

ABSL_CONST_INIT absl::Mutex registry_mu(absl::kConstInit);

std::map<std::string, EnvironmentMaker>& Registry() ABSL_EXCLUSIVE_LOCKS_REQUIRED(registry_mu) {
  static auto* const registry = new std::map<std::string, EnvironmentMaker>();
  return *registry;
}

// Empty if nothing was registered under this name.
EnvironmentMaker FindRegistered(const std::string& task) {
  absl::MutexLock lock(&registry_mu);
  const auto found = Registry().find(task);
  return found == Registry().end() ? EnvironmentMaker() : found->second;
}

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
  names.push_back(kPointPixelsDiscrete);
  absl::MutexLock lock(&registry_mu);
  for (const auto& [name, make] : Registry()) names.push_back(name);
  return names;
}

absl::Status RegisterEnvironment(const std::string& task, EnvironmentMaker make) {
  if (task.empty()) return absl::InvalidArgumentError("the name of the task is empty");
  if (!make) return absl::InvalidArgumentError(absl::StrCat("task \"", task, "\" has no function that makes it"));
  const std::vector<std::string> known = KnownTasks();
  absl::MutexLock lock(&registry_mu);
  if (std::count(known.begin(), known.end(), task) > 0 || !Registry().emplace(task, std::move(make)).second) {
    return absl::AlreadyExistsError(absl::StrCat("there is a task \"", task, "\" already"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Simulator>> MakeSimulator(const std::string& task, int image_size,
                                                         EnvironmentOptions::Quality quality) {
  if (image_size < kLeastImageSize || image_size > kMostImageSize) {
    return absl::InvalidArgumentError(
        absl::StrCat("image_size is ", image_size, ", expected ", kLeastImageSize, " to ", kMostImageSize));
  }
  if (task == kPointPixels) return MakePointPixels(image_size);
  if (task == kPointPixelsDiscrete) {
    return absl::InvalidArgumentError(absl::StrCat(task, " is ", kPointPixels, " with choices in place of its actions: use that"));
  }
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
  if (const EnvironmentMaker make = FindRegistered(options.task)) return make(options);
  if (options.task == kPointPixelsDiscrete) {
    EnvironmentOptions continuous = options;
    continuous.task = kPointPixels;
    continuous.action_size = 0;
    ASSIGN_OR_RETURN(auto environment, MakeEnvironment(continuous));
    return MakeDiscreteActions(std::move(environment), {{0, 0}, {-1, 0}, {1, 0}, {0, -1}, {0, 1}});
  }
  if (options.action_repeat < 1) {
    return absl::InvalidArgumentError(absl::StrCat("action_repeat is ", options.action_repeat, ", expected at least 1"));
  }
  if (options.time_limit < 0) {
    return absl::InvalidArgumentError(absl::StrCat("time_limit is ", options.time_limit, ", expected at least 0"));
  }
  ASSIGN_OR_RETURN(auto simulator, MakeSimulator(options.task, options.image_size, options.quality));
  const int action_size = static_cast<int>(simulator->action_range().size());
  if (options.action_size != 0 && options.action_size < action_size) {
    return absl::InvalidArgumentError(absl::StrCat("action_size is ", options.action_size, ", expected 0 or at least ",
                                                   action_size, ", what ", options.task, " takes"));
  }
  return MakeSimulatorEnvironment(std::move(simulator), options.image_size, options.action_repeat, options.time_limit,
                                  options.action_size);
}

}  // namespace orrery
