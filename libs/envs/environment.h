// What an agent plays: observations in, actions out.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "libs/base/array.h"
#include "orrery/config/v1/experiment.pb.h"

namespace orrery {

// One modality as the environment delivers it, without a batch dimension: images [height, width, channels] uint8,
// vectors [size] float32.
struct TensorSpec {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<int64_t> shape;
  bool operator==(const TensorSpec&) const = default;
};

// Continuous: `size` numbers in [-1, 1] (wrappers scale to the task's own units). Discrete: one-hot over `size` choices.
struct ActionSpec {
  int size = 0;
  bool discrete = false;
  bool operator==(const ActionSpec&) const = default;
};

struct EnvironmentSpec {
  std::vector<TensorSpec> observations;  // ordered by name
  ActionSpec action;
  bool operator==(const EnvironmentSpec&) const = default;
};

// 64-bit hash of names, dtypes, shapes and the action; the same on every machine.
uint64_t Hash(const EnvironmentSpec& spec);

// What followed an action (or Reset).
struct TimeStep {
  ArrayMap observation;      // as in the specification
  double reward = 0;         // came with this observation; 0 after Reset
  bool is_terminal = false;  // the task ended
  bool is_last = false;      // the episode ended, by the task or by its time limit
};

// What would follow, tried out in a copy of an environment's state: no pictures, and the environment never notices. Not
// thread-safe; several of one environment may be used on several threads at once, but not while a call on the environment
// runs. The environment must outlive it.
class Lookahead {
 public:
  virtual ~Lookahead() = default;
  // Back to the environment's present state. FAILED_PRECONDITION unless an episode is running.
  virtual absl::Status Restart() = 0;
  // The reward that Environment::Step would give for the action, to the last bit; 0 after the end of the episode.
  // INVALID_ARGUMENT for an action of the wrong size or not finite, OUT_OF_RANGE when the simulation became invalid,
  // FAILED_PRECONDITION before the first Restart and after OUT_OF_RANGE.
  virtual absl::StatusOr<double> Step(absl::Span<const float> action) = 0;
};

// One simulator. Not thread-safe; may move between threads while no call is running, except that rendering contexts are
// handled inside. INVALID_ARGUMENT for an action of the wrong size or not finite, FAILED_PRECONDITION for a Step before
// Reset or after is_last.
class Environment {
 public:
  virtual ~Environment() = default;
  virtual const EnvironmentSpec& spec() const = 0;
  // Begins an episode; the same seed gives the same episode.
  virtual absl::StatusOr<TimeStep> Reset(uint64_t seed) = 0;
  virtual absl::StatusOr<TimeStep> Step(absl::Span<const float> action) = 0;
  // A picture [height, width, 3] uint8 of the present state, for people (films).
  virtual absl::StatusOr<Array> Render(int height, int width) = 0;
  // For planners that know the true dynamics; needs no running episode. UNIMPLEMENTED where a task offers none.
  virtual absl::StatusOr<std::unique_ptr<Lookahead>> MakeLookahead() const {
    return absl::UnimplementedError("this environment cannot look ahead");
  }
};

// How a task is made.
struct EnvironmentOptions {
  enum class Quality { kReference, kFast };
  std::string task;
  int action_repeat = 1;
  int image_size = 64;  // 32 to 128
  Quality quality = Quality::kFast;
  int time_limit = 0;  // simulator steps; 0: the task's own
  // Numbers of a continuous action; 0: the task's own; larger: further numbers are ignored, so that one agent can play tasks
  // with fewer actuators.
  int action_size = 0;
};

// What orrery.config.v1.Environment says.
EnvironmentOptions ToEnvironmentOptions(const config::v1::Environment& environment);

using EnvironmentMaker = std::function<absl::StatusOr<std::unique_ptr<Environment>>(const EnvironmentOptions&)>;

// Makes a task with action repeat (rewards summed, stops at the end of the episode) around it, or whatever was registered under
// its name. Thread-safe. NOT_FOUND lists the known tasks, or names the missing MuJoCo file; INVALID_ARGUMENT names the option
// out of range.
absl::StatusOr<std::unique_ptr<Environment>> MakeEnvironment(const EnvironmentOptions& options);
// Names of all tasks: the built-in ones, then those that were registered.
std::vector<std::string> KnownTasks();
// Makes a task of one's own known to MakeEnvironment, for the rest of the process. `make` is called on several threads at once
// and does itself what the options say (MakeSimulatorEnvironment of simulator.h does it for a Simulator). Thread-safe.
// INVALID_ARGUMENT for an empty name or maker, ALREADY_EXISTS for a name that is known.
absl::Status RegisterEnvironment(const std::string& task, EnvironmentMaker make);

}  // namespace orrery
