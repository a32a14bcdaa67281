// Returns of imagined rollouts: by the kernels of rollout.h, or by LibTorch's operations.
#include <algorithm>

#include "libs/world_model/heads.h"
#include "libs/world_model/world_model_impl.h"

namespace orrery {
namespace {

using torch::Tensor;

RolloutActivation ToRollout(Activation activation) {
  switch (activation) {
    case config::v1::Model::ELU: return RolloutActivation::kElu;
    case config::v1::Model::TANH: return RolloutActivation::kTanh;
    case config::v1::Model::SILU: return RolloutActivation::kSilu;
    default: return RolloutActivation::kRelu;
  }
}

}  // namespace

std::unique_ptr<PackedModel> WorldModel::PackForRollouts(const RolloutKernel& kernel) const {
  return impl_->Pack(kernel);
}

bool WorldModel::Impl::can_pack() const {
  const bool plain_reward = config.reward().output() == config::v1::RewardHead::GAUSSIAN &&
                            config.reward().transform() != config::v1::RewardHead::SYMLOG;
  return !ssm() && !latents.categorical() && !config.layer_norm() && plain_reward && prior_out.bias.is_cpu() &&
         prior_out.bias.scalar_type() == at::kFloat;
}

std::unique_ptr<PackedModel> WorldModel::Impl::Pack(const RolloutKernel& kernel) const {
  auto pack = std::make_unique<PackedModel>(kernel.pair);
  RolloutModel& m = pack->model;
  m.deter = deter;
  m.stoch = stoch;
  m.hidden = input.bias.size(0);
  m.action = action_size;
  m.min_std = static_cast<float>(min_std);
  m.activation = ToRollout(activation);
  const auto gates = [&](const Tensor& x) { return x.narrow(0, 0, 2 * deter); };
  const auto candidate = [&](const Tensor& x) { return x.narrow(0, 2 * deter, deter); };
  m.input = pack->Layer({state_weight(), action_weight()}, input.bias);
  m.reset_update = pack->Layer({gates(gru_weight_ih), gates(gru_weight_hh)}, gates(gru_bias_ih) + gates(gru_bias_hh));
  m.candidate_input = pack->Layer({candidate(gru_weight_ih)}, candidate(gru_bias_ih));
  m.candidate_recurrent = pack->Layer({candidate(gru_weight_hh)}, candidate(gru_bias_hh));
  m.prior_hidden = pack->Layer({prior_hidden.weight}, prior_hidden.bias);
  m.prior_out = pack->Layer({prior_out.weight}, prior_out.bias);
  std::vector<Layer> head = reward.hidden;
  head.push_back(reward.out);
  std::vector<RolloutLayer> layers;
  m.widest = std::max(m.hidden, 2 * stoch);
  for (const Layer& layer : head) {
    const Tensor& w = layer.weight;
    layers.push_back(layers.empty() ? pack->Layer({w.narrow(1, 0, deter), w.narrow(1, deter, stoch)}, layer.bias)
                                    : pack->Layer({w}, layer.bias));
    m.widest = std::max(m.widest, w.size(0));
  }
  pack->SetReward(std::move(layers));
  return pack;
}

std::shared_ptr<const PackedModel> WorldModel::Impl::Packed() const {
  std::vector<std::pair<const void*, int64_t>> versions;
  for (const auto& [name, parameter] : parameters)
    versions.emplace_back(parameter.const_data_ptr(), parameter.is_inference() ? 0 : parameter._version());
  absl::MutexLock lock(&packed_mu);
  if (packed == nullptr || versions != packed_versions) {
    packed = Pack(BestRolloutKernel(bfloat16));
    packed_versions = std::move(versions);
  }
  return packed;
}

Tensor WorldModel::ImaginedReturns(const LatentState& start, const Tensor& actions, const Tensor& noise,
                                   const ReturnOptions& options) const {
  torch::NoGradGuard no_grad;
  const Tensor used = impl_->latents.deterministic() ? at::zeros_like(noise) : noise;
  return impl_->can_pack() && !options.terminal_value
             ? impl_->ReturnsOnCpu(start, actions, used, options)
             : impl_->ReturnsByTorch(start, actions, used, options);
}

Tensor WorldModel::Impl::ReturnsOnCpu(const LatentState& start, const Tensor& actions, const Tensor& noise,
                                      const ReturnOptions& options) const {
  const Tensor h = start.deter.contiguous(), s = start.stoch.contiguous(), a = actions.contiguous(), z = noise.contiguous();
  Tensor returns = at::empty({a.size(1), a.size(2)}, h.options());
  const std::shared_ptr<const PackedModel> weights = Packed();
  Roll(BestRolloutKernel(bfloat16), weights->model,
       {.horizon = a.size(0), .agents = a.size(1), .candidates = a.size(2), .deter = h.const_data_ptr<float>(),
        .stoch = s.const_data_ptr<float>(), .actions = a.const_data_ptr<float>(), .noise = z.const_data_ptr<float>(),
        .discount = static_cast<float>(options.discount), .returns = returns.mutable_data_ptr<float>()},
       workers.get());
  return returns;
}

// All candidates of an agent begin in its state.
Tensor WorldModel::Impl::ReturnsByTorch(const LatentState& start, const Tensor& actions, const Tensor& noise,
                                        const ReturnOptions& options) const {
  const int64_t n = actions.size(1), j = actions.size(2), rows = n * j;
  const auto spread = [&](const Tensor& x) { return x.unsqueeze(1).expand({n, j, x.size(1)}).reshape({rows, x.size(1)}); };
  LatentState state{spread(start.deter), spread(start.stoch)};
  Tensor total = at::zeros({rows}, start.stoch.options());
  double weight = 1;
  for (int64_t t = 0; t < actions.size(0); ++t, weight *= options.discount) {
    const Predicted predicted = PredictFrom(ActionPart(actions[t].reshape({rows, action_size})), state);
    state = {predicted.deter, latents.Sample(predicted.prior, noise[t].reshape({rows, stoch}))};
    const Tensor mean = PredictReward(at::cat({state.deter, state.stoch}, -1)).mean;
    total.add_(PlannedReward(config.reward().transform(), mean), weight);
  }
  if (options.terminal_value) total.add_(ValueOf(at::cat({state.deter, state.stoch}, -1)), weight);
  return total.view({n, j});
}

}  // namespace orrery
