#include "libs/envs/discrete_actions.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

class Choices {
 public:
  explicit Choices(std::vector<std::vector<float>> actions) : actions_(std::move(actions)) {}

  int size() const { return static_cast<int>(actions_.size()); }
  absl::StatusOr<std::vector<float>> Chosen(absl::Span<const float> action) const {
    const auto one = std::find(action.begin(), action.end(), 1.0f);
    const bool is_one_hot = one != action.end() && std::count(action.begin(), action.end(), 0.0f) == size() - 1;
    if (is_one_hot && static_cast<int>(action.size()) == size()) return actions_[one - action.begin()];
    return absl::InvalidArgumentError(
        absl::StrCat("action is [", absl::StrJoin(action, ", "), "], expected one 1 among ", size(), " numbers, the others 0"));
  }

 private:
  const std::vector<std::vector<float>> actions_;
};

class DiscreteLookahead : public Lookahead {
 public:
  DiscreteLookahead(const Choices& choices, std::unique_ptr<Lookahead> lookahead)
      : choices_(choices), lookahead_(std::move(lookahead)) {}

  absl::Status Restart() override { return lookahead_->Restart(); }
  absl::StatusOr<double> Step(absl::Span<const float> action) override {
    ASSIGN_OR_RETURN(const std::vector<float> chosen, choices_.Chosen(action));
    return lookahead_->Step(chosen);
  }

 private:
  const Choices& choices_;  // the environment's
  const std::unique_ptr<Lookahead> lookahead_;
};

class DiscreteActions : public Environment {
 public:
  DiscreteActions(std::unique_ptr<Environment> environment, std::vector<std::vector<float>> choices)
      : environment_(std::move(environment)), choices_(std::move(choices)), spec_(environment_->spec()) {
    spec_.action = {choices_.size(), true};
  }

  const EnvironmentSpec& spec() const override { return spec_; }
  absl::StatusOr<TimeStep> Reset(uint64_t seed) override { return environment_->Reset(seed); }
  absl::StatusOr<TimeStep> Step(absl::Span<const float> action) override {
    ASSIGN_OR_RETURN(const std::vector<float> chosen, choices_.Chosen(action));
    return environment_->Step(chosen);
  }
  absl::StatusOr<Array> Render(int height, int width) override { return environment_->Render(height, width); }
  absl::StatusOr<std::unique_ptr<Lookahead>> MakeLookahead() const override {
    ASSIGN_OR_RETURN(std::unique_ptr<Lookahead> lookahead, environment_->MakeLookahead());
    return std::make_unique<DiscreteLookahead>(choices_, std::move(lookahead));
  }

 private:
  const std::unique_ptr<Environment> environment_;
  const Choices choices_;
  EnvironmentSpec spec_;
};

}  // namespace

std::unique_ptr<Environment> MakeDiscreteActions(std::unique_ptr<Environment> environment,
                                                 std::vector<std::vector<float>> choices) {
  return std::make_unique<DiscreteActions>(std::move(environment), std::move(choices));
}

}  // namespace orrery
