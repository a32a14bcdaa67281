#include "libs/learning/update.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "libs/base/array.h"
#include "libs/base/status.h"
#include "libs/learning/rate_schedule.h"
#include "libs/world_model/behavior.h"
#include "libs/world_model/layout.h"

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
  const int64_t t = batch.reward.size(0), b = batch.reward.size(1), s = StochasticSize(config);
  RETURN_IF_ERROR(CheckTensor(noise.posterior, {t, b, s}, at::kFloat, "noise posterior"));
  if (HasMixture(config)) RETURN_IF_ERROR(CheckTensor(noise.component, {t, b}, at::kFloat, "noise component"));
  if (noise.dropout.defined())
    RETURN_IF_ERROR(CheckTensor(noise.dropout, {t, b, config.modalities_size()}, at::kFloat, "noise dropout"));
  const int64_t distance = OvershootingDistance(config, with_overshooting);
  if (distance == 0) return absl::OkStatus();
  return CheckTensor(noise.overshooting, {distance + 1, t, b, s}, at::kFloat, "noise overshooting");
}

absl::Status CheckModality(const config::v1::Modality& m, const Batch& batch) {
  const int64_t t = batch.reward.size(0), b = batch.reward.size(1);
  std::vector<int64_t> shape = {t, b};
  if (m.has_image()) {
    shape.insert(shape.end(), {m.image().channels(), m.image().height(), m.image().width()});
  } else {
    shape.push_back(m.vector().size());
  }
  const auto it = batch.observations.find(m.name());
  RETURN_IF_ERROR(CheckTensor(it == batch.observations.end() ? Tensor() : it->second, shape, at::kFloat, m.name()));
  const auto there = batch.available.find(m.name());
  if (there == batch.available.end()) return absl::OkStatus();
  return CheckTensor(there->second, {t, b}, at::kByte, "available." + m.name());
}

absl::Status CheckMoment(const Tensor& moment, const Tensor& parameter, const std::string& name) {
  RETURN_IF_ERROR(CheckTensor(moment, parameter.sizes().vec(), at::kFloat, name));
  if (at::isfinite(moment).all().item<bool>()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " holds a number that is not finite"));
}

// Gradients of `loss`, zeros where it does not depend on a parameter. They lie in memory as the parameters do: Adam's step goes
// through both in that order.
std::vector<Tensor> GradientsOf(const Tensor& loss, const std::vector<Tensor>& parameters, bool allow_unused) {
  std::vector<Tensor> gradients = torch::autograd::grad({loss}, parameters, /*grad_outputs=*/{},
                                                        /*retain_graph=*/c10::nullopt, /*create_graph=*/false, allow_unused);
  for (size_t i = 0; i < parameters.size(); ++i) {
    Tensor& gradient = gradients[i];
    if (!gradient.defined()) gradient = at::zeros_like(parameters[i]);
    if (gradient.strides() != parameters[i].strides()) gradient = at::empty_like(parameters[i].detach()).copy_(gradient);
  }
  return gradients;
}

// Names as in UpdateResult.
std::vector<std::pair<const char*, Tensor>> Terms(const LossOutputs& o) {
  std::vector<std::pair<const char*, Tensor>> terms = {{"total", o.loss_total},
                                                       {"observation", o.loss_observation},
                                                       {"reward", o.loss_reward},
                                                       {"kl", o.loss_kl},
                                                       {"overshooting", o.loss_overshooting},
                                                       {"observation_overshooting", o.loss_observation_overshooting},
                                                       {"global_prior", o.loss_global_prior},
                                                       {"continue", o.loss_continue}};
  terms.erase(std::remove_if(terms.begin(), terms.end(), [](const auto& term) { return !term.second.defined(); }),
              terms.end());
  return terms;
}

}  // namespace

const std::vector<std::string>& LossTerms() {
  static const auto* const terms = new std::vector<std::string>{
      "total", "observation", "reward", "kl", "overshooting", "observation_overshooting", "global_prior", "continue",
      "actor", "value"};
  return *terms;
}

absl::Status CheckBatch(const config::v1::Model& config, const Batch& batch) {
  if (!batch.reward.defined() || batch.reward.dim() != 2 || batch.reward.numel() == 0)
    return absl::InvalidArgumentError("reward is not [T, B] with at least one row and one sequence");
  const int64_t t = batch.reward.size(0), b = batch.reward.size(1);
  RETURN_IF_ERROR(CheckTensor(batch.reward, {t, b}, at::kFloat, "reward"));
  RETURN_IF_ERROR(CheckTensor(batch.action, {t, b, ActionSize(config)}, at::kFloat, "action"));
  RETURN_IF_ERROR(CheckTensor(batch.is_first, {t, b}, at::kByte, "is_first"));
  if (config.has_continue_head()) RETURN_IF_ERROR(CheckTensor(batch.is_terminal, {t, b}, at::kByte, "is_terminal"));
  for (const auto& m : config.modalities()) RETURN_IF_ERROR(CheckModality(m, batch));
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
    result.gradients = GradientsOf(result.outputs.loss_total, parameters, /*allow_unused=*/true);
    return result;
  });
}

BehaviorAndGradients ComputeBehavior(const WorldModel& model, const LossOutputs& loss, const BehaviorNoise& noise, bool gradients) {
  torch::AutoGradMode grad_mode(gradients);
  const LatentState start{loss.deter.detach().flatten(0, 1), loss.stoch.detach().flatten(0, 1)};
  BehaviorAndGradients result{ImagineBehavior(model, start, noise), {}, {}};
  if (!gradients) return result;
  const auto of = [&](const Tensor& x, absl::string_view prefix) {
    std::vector<Tensor> parameters;
    for (const auto& parameter : model.named_parameters())
      if (absl::StartsWith(parameter.key(), prefix)) parameters.push_back(parameter.value());
    return GradientsOf(x, parameters, /*allow_unused=*/false);
  };
  result.actor = of(result.outputs.loss_actor, "actor.");
  result.value = of(result.outputs.loss_value, "value.");
  return result;
}

Updater::Updater(std::shared_ptr<WorldModel> model, const config::v1::Learning& learning, DataParallel* ranks)
    : model_(std::move(model)),
      schedule_(learning.rate_schedule()),
      epsilon_(learning.adam_epsilon()),
      clip_(learning.gradient_clip()),
      ranks_(ranks) {
  model_group_.learning_rate = learning.learning_rate();
  actor_group_.learning_rate = learning.actor_learning_rate();
  value_group_.learning_rate = learning.value_learning_rate();
  for (const auto& parameter : model_->named_parameters()) {
    Group& group = absl::StartsWith(parameter.key(), "actor.")   ? actor_group_
                   : absl::StartsWith(parameter.key(), "value.") ? value_group_
                                                                 : model_group_;
    group.names.push_back(parameter.key());
    group.parameters.push_back(parameter.value());
    group.first_moments.push_back(at::zeros_like(parameter.value().detach()));
    group.second_moments.push_back(at::zeros_like(parameter.value().detach()));
  }
  device_steps_ = at::zeros({}, model_group_.parameters[0].options().requires_grad(false));
}

LossNoise Updater::DrawLossNoise(const Batch& batch, torch::Generator& generator) const {
  const int64_t t = batch.reward.size(0), b = batch.reward.size(1);
  if (ranks_ == nullptr) return model_->DrawNoise(t, b, generator, false);
  LossNoise noise = model_->DrawNoise(t, b * ranks_->size(), generator, false);
  noise.posterior = ranks_->Part(noise.posterior, 1);
  noise.overshooting = ranks_->Part(noise.overshooting, 2);
  noise.component = ranks_->Part(noise.component, 1);
  noise.dropout = ranks_->Part(noise.dropout, 1);
  return noise;
}

BehaviorNoise Updater::DrawNoiseOfBehavior(const LossOutputs& o, torch::Generator& generator) const {
  const int64_t t = o.deter.size(0), b = o.deter.size(1);
  if (ranks_ == nullptr) return DrawBehaviorNoise(*model_, t * b, generator);
  BehaviorNoise noise = DrawBehaviorNoise(*model_, t * b * ranks_->size(), generator);
  const auto part = [&](const Tensor& whole) {  // [H, T·B, size]
    return ranks_->Part(whole.unflatten(1, {t, b * ranks_->size()}), 2).flatten(1, 2);
  };
  return {part(noise.action), part(noise.state)};
}

absl::Status Updater::Average(Computed& computed) {
  if (ranks_ == nullptr) return absl::OkStatus();
  std::vector<Tensor> pieces;
  for (const Gradients& g : computed.gradients)
    for (const Tensor& tensor : g.tensors) pieces.push_back(tensor.flatten());
  for (const auto& term : computed.terms) pieces.push_back(term.second.detach().reshape({1}));
  Tensor all = at::cat(pieces);
  RETURN_IF_ERROR(ranks_->Mean(all));
  int64_t begin = 0;
  for (Gradients& g : computed.gradients) {
    for (Tensor& tensor : g.tensors) {
      tensor.copy_(all.narrow(0, begin, tensor.numel()).view(tensor.sizes()));
      begin += tensor.numel();
    }
  }
  for (auto& term : computed.terms) term.second = all[begin++];
  return absl::OkStatus();
}

void Updater::AddBehavior(const LossOutputs& o, torch::Generator& generator, std::vector<Gradients>& gradients,
                          std::vector<std::pair<const char*, Tensor>>& terms) {
  if (!model_->config().has_behavior()) return;
  const BehaviorNoise noise = DrawNoiseOfBehavior(o, generator);
  BehaviorAndGradients behavior = ComputeBehavior(*model_, o, noise, /*gradients=*/true);
  gradients.push_back({&actor_group_, std::move(behavior.actor)});
  gradients.push_back({&value_group_, std::move(behavior.value)});
  terms.emplace_back("actor", behavior.outputs.loss_actor);
  terms.emplace_back("value", behavior.outputs.loss_value);
}

absl::StatusOr<Updater::Computed> Updater::Compute(const Batch& batch, torch::Generator& generator) {
  if (!batch.reward.defined() || batch.reward.dim() != 2) return CheckBatch(model_->config(), batch);
  const LossNoise noise = DrawLossNoise(batch, generator);
  ASSIGN_OR_RETURN(LossAndGradients loss, ComputeLoss(*model_, batch, noise, false, /*gradients=*/true));
  Computed computed;
  computed.terms = Terms(loss.outputs);
  // The model's parameters come first among all (layout.h).
  loss.gradients.resize(model_group_.parameters.size());
  computed.gradients = {{&model_group_, std::move(loss.gradients)}};
  AddBehavior(loss.outputs, generator, computed.gradients, computed.terms);
  torch::NoGradGuard no_grad;
  RETURN_IF_ERROR(Average(computed));
  std::vector<Tensor> scalars;
  for (const Gradients& g : computed.gradients)
    scalars.push_back(at::linalg_vector_norm(at::stack(at::_foreach_norm(g.tensors))));
  for (const auto& term : computed.terms) scalars.push_back(term.second.detach());
  computed.values = at::stack(scalars);
  return computed;
}

absl::StatusOr<UpdateResult> Updater::Update(const Batch& batch, torch::Generator& generator) {
  return CatchExceptions("updating", [&]() -> absl::StatusOr<UpdateResult> {
    ASSIGN_OR_RETURN(Computed computed, Compute(batch, generator));
    torch::NoGradGuard no_grad;
    const std::vector<Gradients>& gradients = computed.gradients;
    const Tensor values = computed.values.to(at::kCPU, at::kDouble);  // one copy from the device
    const double* value = values.const_data_ptr<double>();

    UpdateResult result;
    result.gradient_norm = value[0];
    for (size_t i = 0; i < computed.terms.size(); ++i) result.losses[computed.terms[i].first] = value[gradients.size() + i];
    result.skipped = !std::all_of(value, value + values.numel(), [](double x) { return std::isfinite(x); });
    if (result.skipped) return result;
    device_steps_.fill_(++steps_);
    const double factor = RateFactor(schedule_, steps_);
    result.learning_rate = model_group_.learning_rate * factor;
    for (size_t i = 0; i < gradients.size(); ++i) {
      Group& group = *gradients[i].group;
      if (const double scale = clip_ / (value[i] + 1e-6); scale < 1) at::_foreach_mul_(gradients[i].tensors, scale);
      Step(group, gradients[i].tensors, group.learning_rate * factor, /*skip=*/c10::nullopt);
    }
    return result;
  });
}

absl::StatusOr<Tensor> Updater::Enqueue(const Batch& batch, torch::Generator& generator) {
  return CatchExceptions("updating", [&]() -> absl::StatusOr<Tensor> {
    ASSIGN_OR_RETURN(Computed computed, Compute(batch, generator));
    torch::NoGradGuard no_grad;
    enqueued_terms_.clear();
    for (const auto& term : computed.terms) enqueued_terms_.push_back(term.first);
    const Tensor skip = computed.values.isfinite().all().logical_not().to(at::kFloat);
    device_steps_.add_(1 - skip);
    c10::optional<Tensor> factor;
    if (!IsConstant(schedule_)) factor = RateFactor(schedule_, device_steps_);
    for (size_t i = 0; i < computed.gradients.size(); ++i) {
      Gradients& g = computed.gradients[i];
      at::_foreach_mul_(g.tensors, (clip_ / (computed.values[static_cast<int64_t>(i)] + 1e-6)).clamp_max(1));
      if (factor.has_value()) {
        Step(*g.group, g.tensors, *factor * g.group->learning_rate, skip);
      } else {
        Step(*g.group, g.tensors, g.group->learning_rate, skip);
      }
    }
    return computed.values;
  });
}

UpdateResult Updater::Read(const Tensor& values) {
  const Tensor host = values.to(at::kCPU, at::kDouble);
  const double* value = host.const_data_ptr<double>();
  const size_t count = static_cast<size_t>(host.numel()), norms = count - enqueued_terms_.size();
  UpdateResult result;
  result.gradient_norm = value[0];
  for (size_t i = norms; i < count; ++i) result.losses[enqueued_terms_[i - norms]] = value[i];
  result.skipped = !std::all_of(value, value + count, [](double x) { return std::isfinite(x); });
  if (result.skipped) return result;
  result.learning_rate = model_group_.learning_rate * RateFactor(schedule_, ++steps_);
  return result;
}

template <typename Rate>
void Updater::Step(Group& group, const std::vector<Tensor>& gradients, const Rate& rate,
                   const c10::optional<Tensor>& skip) {
  const std::vector<Tensor> steps(group.parameters.size(), device_steps_);
  at::_fused_adam_(group.parameters, gradients, group.first_moments, group.second_moments, /*max_exp_avg_sqs=*/{}, steps,
                   rate, kBeta1, kBeta2, /*weight_decay=*/0, epsilon_, /*amsgrad=*/false,
                   /*maximize=*/false, /*grad_scale=*/{}, /*found_inf=*/skip);
}

TensorMap Updater::State() const {
  TensorMap state;
  for (const Group* group : groups()) {
    for (size_t i = 0; i < group->names.size(); ++i) {
      state.emplace(kFirst + group->names[i], group->first_moments[i].to(at::kCPU, at::kFloat, false, /*copy=*/true));
      state.emplace(kSecond + group->names[i], group->second_moments[i].to(at::kCPU, at::kFloat, false, /*copy=*/true));
    }
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
  size_t expected = 1, count = 0;
  for (const Group* group : groups()) {
    expected += 2 * group->names.size();
    for (size_t i = 0; i < group->names.size(); ++i) {
      for (const char* prefix : {kFirst, kSecond})
        RETURN_IF_ERROR(CheckMoment(find(prefix + group->names[i]), group->parameters[i], prefix + group->names[i]));
    }
  }
  for (const auto& entry : state) count += absl::StartsWith(entry.first, "adam.");
  if (count != expected)
    return absl::InvalidArgumentError("the optimizer state holds tensors of parameters that the model does not have");
  torch::NoGradGuard no_grad;
  for (Group* group : groups()) {
    for (size_t i = 0; i < group->names.size(); ++i) {
      group->first_moments[i].copy_(state.at(kFirst + group->names[i]));
      group->second_moments[i].copy_(state.at(kSecond + group->names[i]));
    }
  }
  steps_ = step.item<int64_t>();
  device_steps_.fill_(steps_);
  return absl::OkStatus();
}

}  // namespace orrery
