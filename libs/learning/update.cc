#include "libs/learning/update.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "libs/base/array.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

using torch::Tensor;

constexpr double kBeta1 = 0.9, kBeta2 = 0.999;
constexpr char kStep[] = "adam.step", kFirst[] = "adam.m.", kSecond[] = "adam.v.";

absl::Status CheckTensor(const Tensor& tensor, const std::vector<int64_t>& shape, at::ScalarType type,
                         absl::string_view what) {
  if (tensor.defined() && tensor.scalar_type() == type && tensor.sizes() == at::IntArrayRef(shape))
    return absl::OkStatus();
  const std::string actual =
      tensor.defined() ? absl::StrCat(at::toString(tensor.scalar_type()), " ", ShapeString(tensor.sizes().vec())) : "missing";
  return absl::InvalidArgumentError(
      absl::StrCat(what, " is ", actual, "; expected ", at::toString(type), " ", ShapeString(shape)));
}

absl::Status CheckNoise(const config::v1::Model& config, const Batch& batch, const LossNoise& noise,
                        bool with_overshooting) {
  const int64_t t = batch.reward.size(0), b = batch.reward.size(1), s = config.stochastic_size();
  RETURN_IF_ERROR(CheckTensor(noise.posterior, {t, b, s}, at::kFloat, "noise posterior"));
  const auto& overshooting = config.objective().overshooting();
  if (overshooting.distance() < 2 || (!with_overshooting && overshooting.scale() == 0)) return absl::OkStatus();
  return CheckTensor(noise.overshooting, {overshooting.distance() + 1, t, b, s}, at::kFloat, "noise overshooting");
}

}  // namespace

absl::Status CheckBatch(const config::v1::Model& config, const Batch& batch) {
  if (!batch.reward.defined() || batch.reward.dim() != 2 || batch.reward.numel() == 0)
    return absl::InvalidArgumentError("reward is not [T, B] with at least one row and one sequence");
  const int64_t t = batch.reward.size(0), b = batch.reward.size(1);
  RETURN_IF_ERROR(CheckTensor(batch.reward, {t, b}, at::kFloat, "reward"));
  RETURN_IF_ERROR(CheckTensor(batch.action, {t, b, ActionSize(config)}, at::kFloat, "action"));
  RETURN_IF_ERROR(CheckTensor(batch.is_first, {t, b}, at::kByte, "is_first"));
  for (const auto& m : config.modalities()) {
    std::vector<int64_t> shape = {t, b};
    if (m.has_image()) {
      shape.insert(shape.end(), {m.image().channels(), m.image().height(), m.image().width()});
    } else {
      shape.push_back(m.vector().size());
    }
    const auto it = batch.observations.find(m.name());
    RETURN_IF_ERROR(CheckTensor(it == batch.observations.end() ? Tensor() : it->second, shape, at::kFloat, m.name()));
  }
  for (const auto& entry : batch.observations) {
    const auto known = [&](const config::v1::Modality& m) { return m.name() == entry.first; };
    if (std::none_of(config.modalities().begin(), config.modalities().end(), known))
      return absl::InvalidArgumentError(absl::StrCat(entry.first, " is not a modality of the model"));
  }
  return absl::OkStatus();
}

absl::StatusOr<LossAndGradients> ComputeLoss(const WorldModel& model, const Batch& batch, const LossNoise& noise,
                                             bool with_overshooting, bool gradients) {
  RETURN_IF_ERROR(CheckBatch(model.config(), batch));
  RETURN_IF_ERROR(CheckNoise(model.config(), batch, noise, with_overshooting));
  return CatchExceptions("computing the loss", [&]() -> absl::StatusOr<LossAndGradients> {
    torch::AutoGradMode grad_mode(gradients);
    LossAndGradients result{model.Loss(batch, noise, with_overshooting), {}};
    if (!gradients) return result;
    const std::vector<Tensor> parameters = model.parameters();
    result.gradients = torch::autograd::grad({result.outputs.loss_total}, parameters, /*grad_outputs=*/{},
                                             /*retain_graph=*/c10::nullopt, /*create_graph=*/false,
                                             /*allow_unused=*/true);
    for (size_t i = 0; i < parameters.size(); ++i)
      if (!result.gradients[i].defined()) result.gradients[i] = at::zeros_like(parameters[i]);
    return result;
  });
}

Updater::Updater(std::shared_ptr<WorldModel> model, const config::v1::Learning& learning)
    : model_(std::move(model)),
      learning_rate_(learning.learning_rate()),
      epsilon_(learning.adam_epsilon()),
      clip_(learning.gradient_clip()) {
  for (const auto& parameter : model_->named_parameters()) {
    names_.push_back(parameter.key());
    parameters_.push_back(parameter.value());
    first_moments_.push_back(at::zeros_like(parameter.value().detach()));
    second_moments_.push_back(at::zeros_like(parameter.value().detach()));
  }
}

absl::StatusOr<UpdateResult> Updater::Update(const Batch& batch, torch::Generator& generator) {
  if (!batch.reward.defined() || batch.reward.dim() != 2) return CheckBatch(model_->config(), batch);
  const LossNoise noise = model_->DrawNoise(batch.reward.size(0), batch.reward.size(1), generator, false);
  ASSIGN_OR_RETURN(LossAndGradients computed, ComputeLoss(*model_, batch, noise, false, /*gradients=*/true));
  return CatchExceptions("updating", [&]() -> absl::StatusOr<UpdateResult> {
    torch::NoGradGuard no_grad;
    const LossOutputs& o = computed.outputs;
    const Tensor norm = at::linalg_vector_norm(at::stack(at::_foreach_norm(computed.gradients)));
    std::vector<std::pair<const char*, Tensor>> terms = {{"total", o.loss_total},
                                                         {"observation", o.loss_observation},
                                                         {"reward", o.loss_reward},
                                                         {"kl", o.loss_kl}};
    if (o.loss_overshooting.defined()) terms.emplace_back("overshooting", o.loss_overshooting);
    std::vector<Tensor> scalars = {norm};
    for (const auto& term : terms) scalars.push_back(term.second);
    const Tensor values = at::stack(scalars).to(at::kCPU, at::kDouble);  // one copy from the device

    UpdateResult result;
    const double* value = values.const_data_ptr<double>();
    result.gradient_norm = value[0];
    for (size_t i = 0; i < terms.size(); ++i) result.losses[terms[i].first] = value[i + 1];
    result.skipped = !std::isfinite(result.gradient_norm) || !std::isfinite(result.losses["total"]);
    if (result.skipped) return result;
    if (const double scale = clip_ / (result.gradient_norm + 1e-6); scale < 1)
      at::_foreach_mul_(computed.gradients, scale);
    Step(computed.gradients);
    return result;
  });
}

void Updater::Step(const std::vector<Tensor>& gradients) {
  ++steps_;
  const Tensor step = at::scalar_tensor(static_cast<float>(steps_), parameters_[0].options().requires_grad(false));
  const std::vector<Tensor> steps(parameters_.size(), step);
  at::_fused_adam_(parameters_, gradients, first_moments_, second_moments_, /*max_exp_avg_sqs=*/{}, steps,
                   learning_rate_, kBeta1, kBeta2, /*weight_decay=*/0, epsilon_, /*amsgrad=*/false, /*maximize=*/false);
}

TensorMap Updater::State() const {
  TensorMap state;
  for (size_t i = 0; i < names_.size(); ++i) {
    state.emplace(kFirst + names_[i], first_moments_[i].to(at::kCPU, at::kFloat, false, /*copy=*/true));
    state.emplace(kSecond + names_[i], second_moments_[i].to(at::kCPU, at::kFloat, false, /*copy=*/true));
  }
  state.emplace(kStep, at::scalar_tensor(steps_, at::kLong));
  return state;
}

absl::Status Updater::Restore(const TensorMap& state) {
  const auto find = [&](const std::string& name) {
    const auto it = state.find(name);
    return it == state.end() ? Tensor() : it->second;
  };
  const Tensor step = find(kStep);
  RETURN_IF_ERROR(CheckTensor(step, {}, at::kLong, kStep));
  if (step.item<int64_t>() < 0)
    return absl::InvalidArgumentError(absl::StrCat(kStep, " is ", step.item<int64_t>(), "; expected at least 0"));
  for (size_t i = 0; i < names_.size(); ++i) {
    for (const char* prefix : {kFirst, kSecond}) {
      const std::string name = prefix + names_[i];
      const Tensor moment = find(name);
      RETURN_IF_ERROR(CheckTensor(moment, parameters_[i].sizes().vec(), at::kFloat, name));
      if (!at::isfinite(moment).all().item<bool>())
        return absl::InvalidArgumentError(absl::StrCat(name, " holds a number that is not finite"));
    }
  }
  size_t count = 0;
  for (const auto& entry : state) count += absl::StartsWith(entry.first, "adam.");
  if (count != 2 * names_.size() + 1)
    return absl::InvalidArgumentError("the optimizer state holds tensors of parameters that the model does not have");
  torch::NoGradGuard no_grad;
  for (size_t i = 0; i < names_.size(); ++i) {
    first_moments_[i].copy_(state.at(kFirst + names_[i]));
    second_moments_[i].copy_(state.at(kSecond + names_[i]));
  }
  steps_ = step.item<int64_t>();
  return absl::OkStatus();
}

}  // namespace orrery
