// What a task implements; environments, action repeat, time limits and rollouts are made from it once, here.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "libs/base/array.h"
#include "libs/envs/environment.h"

namespace orrery {

// A copy of a simulator's state that is stepped alone: it draws nothing and leaves the simulator as it is. Not thread-safe;
// several copies may be used on several threads at once, but not while a call on the simulator runs. The simulator must
// outlive it.
class SimulatorCopy {
 public:
  virtual ~SimulatorCopy() = default;
  // Takes on the simulator's present state; needed before the first step and after a failed one.
  virtual absl::Status Restart() = 0;
  // As Simulator::Step: from the same state the same rewards, to the last bit.
  virtual absl::StatusOr<double> Step(absl::Span<const double> action) = 0;
};

// A given start. What is missing is the model's default.
struct SimulatorStart {
  std::optional<absl::Span<const double>> qpos;    // positions, in the model's order and units
  std::optional<absl::Span<const double>> qvel;    // velocities
  std::optional<absl::Span<const double>> target;  // where the task's target is; only for tasks with a "target" in their State
};

// One simulated world with a continuous action and a picture. Not thread-safe; may move between threads while no call is
// running. The caller checks actions (size, finite); OUT_OF_RANGE when the simulation itself became invalid.
class Simulator {
 public:
  virtual ~Simulator() = default;
  // Lowest and highest value of each action in the task's own units.
  virtual const std::vector<std::pair<double, double>>& action_range() const = 0;
  // Steps of an episode.
  virtual int time_limit() const = 0;
  // A start drawn from the task's distribution; the same seed gives the same start.
  virtual absl::Status Reset(uint64_t seed) = 0;
  // INVALID_ARGUMENT for a wrong size, a value that is not finite, or a target where the task has none.
  virtual absl::Status ResetTo(const SimulatorStart& start) = 0;
  // One step with an action in the task's own units; returns its reward.
  virtual absl::StatusOr<double> Step(absl::Span<const double> action) = 0;
  // The state and the task's own vector observations, float64: "qpos", "qvel" (where there are velocities), "target" (where
  // a target's place belongs to an episode's start), ….
  virtual ArrayMap State() const = 0;
  // The agent's picture of the present state, [size, size, 3] uint8.
  virtual absl::StatusOr<Array> Image() = 0;
  // A picture for people, [height, width, 3] uint8. INVALID_ARGUMENT for a size that cannot be drawn.
  virtual absl::StatusOr<Array> Render(int height, int width) = 0;
  // UNIMPLEMENTED where a task offers none.
  virtual absl::StatusOr<std::unique_ptr<SimulatorCopy>> MakeCopy() const {
    return absl::UnimplementedError("this task's simulator cannot be copied");
  }
};

// Makes the simulator of a task with pictures of that size, 32 to 128. Errors as MakeEnvironment's.
absl::StatusOr<std::unique_ptr<Simulator>> MakeSimulator(const std::string& task, int image_size,
                                                         EnvironmentOptions::Quality quality);

// An environment around a simulator: checks actions and their order, scales them from [-1, 1] (values outside are cut),
// repeats each `action_repeat` times with the rewards summed, and ends an episode after `time_limit` simulator steps
// (0: the simulator's own). Actions have `action_size` numbers (0: the simulator's own; at least as many), of which those
// beyond the simulator's are ignored. All of these must be valid. It looks ahead where the simulator can be copied.
std::unique_ptr<Environment> MakeSimulatorEnvironment(std::unique_ptr<Simulator> simulator, int image_size,
                                                      int action_repeat, int time_limit, int action_size = 0);

// OK, or INVALID_ARGUMENT naming `what` unless `values` has `size` finite numbers.
absl::Status CheckNumbers(absl::Span<const double> values, size_t size, absl::string_view what);

}  // namespace orrery
