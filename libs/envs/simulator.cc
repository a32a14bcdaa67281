#include "libs/envs/simulator.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

class SimulatorEnvironment : public Environment {
 public:
  SimulatorEnvironment(std::unique_ptr<Simulator> simulator, int image_size, int action_repeat, int time_limit)
      : simulator_(std::move(simulator)),
        action_repeat_(action_repeat),
        time_limit_(time_limit > 0 ? time_limit : simulator_->time_limit()) {
    spec_.observations = {{"image", DType::kUInt8, {image_size, image_size, 3}}};
    spec_.action.size = static_cast<int>(simulator_->action_range().size());
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
    if (!running_) return absl::FailedPreconditionError("no episode is running: call Reset first");
    const std::vector<double> numbers(action.begin(), action.end());
    RETURN_IF_ERROR(CheckNumbers(numbers, simulator_->action_range().size(), "action"));
    const std::vector<double> scaled = Scale(numbers);
    running_ = false;  // Unless the whole step succeeds.
    TimeStep step;
    for (int i = 0; i < action_repeat_ && steps_ < time_limit_; ++i) {
      ASSIGN_OR_RETURN(const double reward, simulator_->Step(scaled));
      step.reward += reward;
      ++steps_;
    }
    ASSIGN_OR_RETURN(step.observation["image"], simulator_->Image());
    step.is_last = steps_ >= time_limit_;
    running_ = !step.is_last;
    return step;
  }

  absl::StatusOr<Array> Render(int height, int width) override { return simulator_->Render(height, width); }

 private:
  std::vector<double> Scale(const std::vector<double>& action) const {
    std::vector<double> scaled(action.size());
    for (size_t i = 0; i < action.size(); ++i) {
      const auto [low, high] = simulator_->action_range()[i];
      scaled[i] = (low + high) / 2 + (high - low) / 2 * std::clamp(action[i], -1.0, 1.0);
    }
    return scaled;
  }

  // Constant after construction.
  const std::unique_ptr<Simulator> simulator_;
  const int action_repeat_;
  const int time_limit_;
  EnvironmentSpec spec_;

  int steps_ = 0;  // simulator steps of this episode
  bool running_ = false;
};

}  // namespace

std::unique_ptr<Environment> MakeSimulatorEnvironment(std::unique_ptr<Simulator> simulator, int image_size,
                                                      int action_repeat, int time_limit) {
  return std::make_unique<SimulatorEnvironment>(std::move(simulator), image_size, action_repeat, time_limit);
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
