#include "libs/learning/weight_average.h"

#include <cmath>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

constexpr char kMean[] = "average.";

}  // namespace

WeightAverage::WeightAverage(std::shared_ptr<const WorldModel> model, std::shared_ptr<WorldModel> average, double decay)
    : model_(std::move(model)),
      average_(std::move(average)),
      decay_(decay),
      weights_(model_->parameters()),
      means_(average_->parameters()) {
  Add(/*update=*/1);
}

void WeightAverage::Add(int64_t update) {
  const torch::NoGradGuard no_grad;
  // The share of the newest weights, (1 - decay) / (1 - decay^n); 1 for the first.
  const double share = (1 - decay_) / -std::expm1(static_cast<double>(update) * std::log(decay_));
  at::_foreach_lerp_(means_, weights_, share);
}

TensorMap WeightAverage::State() const {
  TensorMap state;
  for (const auto& parameter : average_->named_parameters()) {
    state[absl::StrCat(kMean, parameter.key())] = parameter.value().detach().cpu().clone();
  }
  return state;
}

absl::Status WeightAverage::Check(const TensorMap& state) const {
  for (const auto& parameter : average_->named_parameters()) {
    const std::string name = absl::StrCat(kMean, parameter.key());
    const auto found = state.find(name);
    if (found == state.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " is missing: the checkpoint was made without learning.weight_average_decay"));
    }
    const torch::Tensor &given = found->second, &expected = parameter.value();
    if (given.sizes() != expected.sizes() || given.scalar_type() != expected.scalar_type()) {
      return absl::InvalidArgumentError(absl::StrCat(name, " is ", toString(given.scalar_type()), " [",
                                                     absl::StrJoin(given.sizes(), ", "), "], the model has ",
                                                     toString(expected.scalar_type()), " [",
                                                     absl::StrJoin(expected.sizes(), ", "), "]"));
    }
  }
  return absl::OkStatus();
}

void WeightAverage::Restore(const TensorMap& state) {
  const torch::NoGradGuard no_grad;
  for (auto& parameter : average_->named_parameters()) parameter.value().copy_(state.at(absl::StrCat(kMean, parameter.key())));
}

}  // namespace orrery
