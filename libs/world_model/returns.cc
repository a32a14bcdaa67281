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

// Up to so many candidates times steps the actions and rewards of all steps are computed at once on a device: fewer operations
// to launch, which is what small plans wait for, at the price of memory.
constexpr int64_t kRowsTogether = 1 << 17;

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
  m.widest = std::max(m.hidden, 2 * stoch);
  const auto pack_head = [&](const Mlp& mlp) {
    std::vector<Layer> head = mlp.hidden;
    head.push_back(mlp.out);
    std::vector<RolloutLayer> layers;
    for (const Layer& layer : head) {
      const Tensor& w = layer.weight;
      layers.push_back(layers.empty() ? pack->Layer({w.narrow(1, 0, deter), w.narrow(1, deter, stoch)}, layer.bias)
                                      : pack->Layer({w}, layer.bias));
      m.widest = std::max(m.widest, w.size(0));
    }
    return pack->Head(std::move(layers));
  };
  m.reward = pack_head(reward);
  if (config.has_continue_head()) m.goes_on = pack_head(continues);
  return pack;
}

std::vector<std::pair<const void*, int64_t>> WorldModel::Impl::ParameterVersions() const {
  std::vector<std::pair<const void*, int64_t>> versions = {{nullptr, instance}};
  for (const auto& [name, parameter] : parameters)
    versions.emplace_back(parameter.const_data_ptr(), parameter.is_inference() ? 0 : parameter._version());
  return versions;
}

void WorldModel::Impl::DropStale() const {
  auto versions = ParameterVersions();
  if (versions == packed_versions) return;
  packed = nullptr;
  lowered = nullptr;
  packed_versions = std::move(versions);
}

std::shared_ptr<const PackedModel> WorldModel::Impl::Packed() const {
  absl::MutexLock lock(&packed_mu);
  DropStale();
  if (packed == nullptr) packed = Pack(BestRolloutKernel(bfloat16));
  return packed;
}

std::shared_ptr<const WorldModel::Impl> WorldModel::Impl::Lowered() const {
  absl::MutexLock lock(&packed_mu);
  DropStale();
  if (lowered == nullptr) {
    TensorMap weights;
    for (const auto& [name, parameter] : parameters) weights.emplace(name, parameter.detach().to(at::kBFloat16));
    const auto made = std::make_shared<Impl>(config);
    made->Bind(std::move(weights));
    lowered = made;
  }
  return lowered;
}

Tensor WorldModel::ImaginedReturns(const LatentState& start, const Tensor& actions, const Tensor& noise,
                                   const ReturnOptions& options) const {
  torch::NoGradGuard no_grad;
  const Tensor used = impl_->latents.deterministic() ? at::zeros_like(noise) : noise;
  if (impl_->can_pack() && !options.terminal_value) {
    const Tensor z = used.contiguous();
    return impl_->ReturnsOnCpu(start, actions, {.noise = z.const_data_ptr<float>()}, options);
  }
  if (!impl_->bfloat16 || !start.stoch.is_cuda()) return impl_->ReturnsByTorch(start, actions, used, options);
  const auto low = [](const Tensor& x) { return x.to(at::kBFloat16); };
  return impl_->Lowered()->ReturnsByTorch({low(start.deter), low(start.stoch)}, low(actions), used, options);
}

bool WorldModel::DrawsNoise(const ReturnOptions& options) const {
  return impl_->can_pack() && !options.terminal_value && !impl_->latents.deterministic();
}

Tensor WorldModel::ImaginedReturns(const LatentState& start, const Tensor& actions, const SeededNoise& noise,
                                   const ReturnOptions& options) const {
  torch::NoGradGuard no_grad;
  TORCH_CHECK(DrawsNoise(options), "this model does not draw the noise of its states itself");
  TORCH_CHECK(std::ssize(noise.seeds) == actions.size(1), noise.seeds.size(), " seeds for ", actions.size(1), " states");
  return impl_->ReturnsOnCpu(start, actions, {.seeds = noise.seeds.data(), .draw = noise.draw}, options);
}

Tensor WorldModel::Impl::ReturnsOnCpu(const LatentState& start, const Tensor& actions, RolloutArrays arrays,
                                      const ReturnOptions& options) const {
  const Tensor h = start.deter.contiguous(), s = start.stoch.contiguous(), a = actions.contiguous();
  arrays.horizon = a.size(0);
  arrays.agents = a.size(1);
  arrays.candidates = a.size(2);
  Tensor returns = at::empty({arrays.agents, arrays.candidates}, h.options());
  arrays.deter = h.const_data_ptr<float>();
  arrays.stoch = s.const_data_ptr<float>();
  arrays.actions = a.const_data_ptr<float>();
  arrays.discount = static_cast<float>(options.discount);
  arrays.returns = returns.mutable_data_ptr<float>();
  const std::shared_ptr<const PackedModel> weights = Packed();
  Roll(BestRolloutKernel(bfloat16), weights->model, arrays, workers.get());
  return returns;
}

// All candidates of an agent begin in its state. Sums are at least float32.
Tensor WorldModel::Impl::ReturnsByTorch(const LatentState& start, const Tensor& actions, const Tensor& noise,
                                        const ReturnOptions& options) const {
  const int64_t h = actions.size(0), n = actions.size(1), j = actions.size(2), rows = n * j;
  const auto spread = [&](const Tensor& x) { return x.unsqueeze(1).expand({n, j, x.size(1)}).reshape({rows, x.size(1)}); };
  const at::ScalarType type = start.stoch.scalar_type(), sum_type = at::promote_types(type, at::kFloat);
  const auto rewards_of = [&](const Tensor& feature) {
    return PlannedReward(config.reward().transform(), PredictReward(feature).mean.to(sum_type));
  };
  const auto continue_of = [&](const Tensor& feature) {
    return config.has_continue_head() ? ContinueOf(feature).to(sum_type) : Tensor();
  };
  const bool together = !actions.is_cpu() && h * rows <= kRowsTogether;
  const Tensor action_parts = together ? ActionPart(actions.reshape({h, rows, action_size})) : Tensor();
  LatentState state{spread(start.deter), spread(start.stoch)};
  Tensor total = at::zeros({rows}, start.stoch.options().dtype(sum_type)), reached;  // the chance of getting there; undefined: 1
  const auto add = [&](const Tensor& rewards, const Tensor& goes_on, double weight) {
    total.add_(reached.defined() ? rewards * reached : rewards, weight);
    if (goes_on.defined()) reached = reached.defined() ? reached * goes_on : goes_on;
  };
  std::vector<Tensor> features;
  double weight = 1;
  for (int64_t t = 0; t < h; ++t, weight *= options.discount) {
    const Tensor action_part = together ? action_parts[t] : ActionPart(actions[t].reshape({rows, action_size}));
    const Predicted predicted = PredictFrom(action_part, state);
    const Tensor drawn = noise[t].reshape({rows, stoch});
    state = {predicted.deter, latents.Sample(predicted.prior, latents.categorical() ? drawn : drawn.to(type))};
    const Tensor feature = at::cat({state.deter, state.stoch}, -1);
    if (together) {
      features.push_back(feature);
    } else {
      add(rewards_of(feature), continue_of(feature), weight);
    }
  }
  if (together) {
    const Tensor all = at::cat(features), rewards = rewards_of(all).view({h, rows});
    const Tensor goes_on = config.has_continue_head() ? continue_of(all).view({h, rows}) : Tensor();
    if (options.discount == 1 && !goes_on.defined()) {
      add(rewards.sum(0), {}, 1);
    } else {
      double k = 1;
      for (int64_t t = 0; t < h; ++t, k *= options.discount) add(rewards[t], goes_on.defined() ? goes_on[t] : Tensor(), k);
    }
  }
  if (options.terminal_value) add(ValueOf(at::cat({state.deter, state.stoch}, -1)), {}, weight);
  return total.view({n, j});
}

}  // namespace orrery
