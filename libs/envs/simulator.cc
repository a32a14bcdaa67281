#include "libs/envs/simulator.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

// How a decision becomes steps of a simulator, or of a copy of one. Thread-safe: constant.
class StepRule {
 public:
  StepRule(std::vector<std::pair<double, double>> action_range, int action_repeat, int time_limit, int action_size)
      : action_range_(std::move(action_range)),
        action_repeat_(action_repeat),
        time_limit_(time_limit),
        action_size_(action_size > 0 ? static_cast<size_t>(action_size) : action_range_.size()) {}

  int action_size() const { return static_cast<int>(action_size_); }

  // The action in the task's own units, without the numbers that it has no use for.
  absl::StatusOr<std::vector<double>> Scale(absl::Span<const float> action) const {
    std::vector<double> numbers(action.begin(), action.end());
    RETURN_IF_ERROR(CheckNumbers(numbers, action_size_, "action"));
    numbers.resize(action_range_.size());
    for (size_t i = 0; i < numbers.size(); ++i) {
      const auto [low, high] = action_range_[i];
      numbers[i] = (low + high) / 2 + (high - low) / 2 * std::clamp(numbers[i], -1.0, 1.0);
    }
    return numbers;
  }

  // Steps a Simulator or a SimulatorCopy with the scaled action, up to the end of the episode at most; counts in `steps`
  // and returns the sum of the rewards.
  template <typename Stepped>
  absl::StatusOr<double> Repeat(Stepped& simulator, const std::vector<double>& scaled, int& steps) const {
    double sum = 0;
    for (int i = 0; i < action_repeat_ && !IsEnd(steps); ++i) {
      ASSIGN_OR_RETURN(const double reward, simulator.Step(scaled));
      sum += reward;
      ++steps;
    }
    return sum;
  }

  bool IsEnd(int steps) const { return steps >= time_limit_; }

 private:
  const std::vector<std::pair<double, double>> action_range_;
  const int action_repeat_;
  const int time_limit_;
  const size_t action_size_;  // at least the task's own
};

class SimulatorEnvironment : public Environment {
 public:
  SimulatorEnvironment(std::unique_ptr<Simulator> simulator, int image_size, int action_repeat, int time_limit,
                       int action_size)
      : simulator_(std::move(simulator)),
        rule_(simulator_->action_range(), action_repeat, time_limit > 0 ? time_limit : simulator_->time_limit(), action_size) {
    spec_.observations = {{"image", DType::kUInt8, {image_size, image_size, 3}}};
    spec_.action.size = rule_.action_size();
  }

  const EnvironmentSpec& spec() const override { return spec_; }

  absl::StatusOr<TimeStep> Reset(uint64_t seed) override {
    running_ = false;
    RETURN_IF_ERROR(simulator_->Reset(seed));
    TimeStep step;
    ASSIGN_OR_RETURN(step.observation["image"], simulator_->Image());
    steps_ = 0;
    running_ = true;
    return step;
  }

  absl::StatusOr<TimeStep> Step(absl::Span<const float> action) override {
    RETURN_IF_ERROR(CheckRunning());
    ASSIGN_OR_RETURN(const std::vector<double> scaled, rule_.Scale(action));
    running_ = false;  // Unless the whole step succeeds.
    TimeStep step;
    ASSIGN_OR_RETURN(step.reward, rule_.Repeat(*simulator_, scaled, steps_));
    ASSIGN_OR_RETURN(step.observation["image"], simulator_->Image());
    step.is_last = rule_.IsEnd(steps_);
    running_ = !step.is_last;
    return step;
  }

  absl::StatusOr<Array> Render(int height, int width) override { return simulator_->Render(height, width); }

  absl::StatusOr<std::unique_ptr<Lookahead>> MakeLookahead() const override {
    ASSIGN_OR_RETURN(std::unique_ptr<SimulatorCopy> copy, simulator_->MakeCopy());
    return std::make_unique<SimulatorLookahead>(*this, std::move(copy));
  }

 private:
  // Steps a copy of the simulator by the environment's rule.
  class SimulatorLookahead : public Lookahead {
   public:
    SimulatorLookahead(const SimulatorEnvironment& environment, std::unique_ptr<SimulatorCopy> copy)
        : environment_(environment), copy_(std::move(copy)) {}

    absl::Status Restart() override {
      ready_ = false;
      RETURN_IF_ERROR(environment_.CheckRunning());
      RETURN_IF_ERROR(copy_->Restart());
      steps_ = environment_.steps_;
      ready_ = true;
      return absl::OkStatus();
    }

    absl::StatusOr<double> Step(absl::Span<const float> action) override {
      if (!ready_) return absl::FailedPreconditionError("nothing to look ahead from: call Restart first");
      ASSIGN_OR_RETURN(const std::vector<double> scaled, environment_.rule_.Scale(action));
      absl::StatusOr<double> reward = environment_.rule_.Repeat(*copy_, scaled, steps_);
      ready_ = reward.ok();
      return reward;
    }

   private:
    const SimulatorEnvironment& environment_;
    const std::unique_ptr<SimulatorCopy> copy_;
    int steps_ = 0;  // simulator steps of the episode, the environment's included
    bool ready_ = false;
  };

  absl::Status CheckRunning() const {
    if (running_) return absl::OkStatus();
    return absl::FailedPreconditionError("no episode is running: call Reset first");
  }

  // Constant after construction.
  const std::unique_ptr<Simulator> simulator_;
  const StepRule rule_;
  EnvironmentSpec spec_;

  int steps_ = 0;  // simulator steps of this episode
  bool running_ = false;
};

}  // namespace

std::unique_ptr<Environment> MakeSimulatorEnvironment(std::unique_ptr<Simulator> simulator, int image_size,
                                                      int action_repeat, int time_limit, int action_size) {
  return std::make_unique<SimulatorEnvironment>(std::move(simulator), image_size, action_repeat, time_limit, action_size);
}

absl::Status CheckNumbers(absl::Span<const double> values, size_t size, absl::string_view what) {
  if (values.size() != size) {
    return absl::InvalidArgumentError(absl::StrCat(what, " has ", values.size(), " numbers, expected ", size));
  }
  for (size_t i = 0; i < size; ++i) {
    if (!std::isfinite(values[i])) {
      return absl::InvalidArgumentError(absl::StrCat(what, "[", i, "] is ", values[i], ", expected a finite number"));
    }
  }
  return absl::OkStatus();
}

}  // namespace orrery
