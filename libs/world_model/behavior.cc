#include "libs/world_model/behavior.h"

#include <cmath>
#include <vector>

#include "libs/world_model/latents.h"

namespace orrery {
namespace {

using config::v1::Behavior;
using torch::Tensor;

constexpr double kMeanScale = 5;
constexpr double kMinStd = 1e-4;
constexpr double kHalfLog2Pi = 0.91893853320467274178;
constexpr double kLog2 = 0.69314718055994530942;

Tensor Mean(const Tensor& outputs) { return kMeanScale * at::tanh(outputs.chunk(2, -1)[0] / kMeanScale); }

// Of tanh(u) with u from N(mean, std²).
Tensor LogProb(const Tensor& mean, const Tensor& std, const Tensor& u) {
  const Tensor gaussian = -0.5 * ((u - mean) / std).square() - std.log() - kHalfLog2Pi;
  const Tensor slope = 2 * (kLog2 - u - at::softplus(-2 * u));  // log(1 - tanh²)
  return (gaussian - slope).sum(-1);
}

LatentState Detached(const LatentState& state) { return {state.deter.detach(), state.stoch.detach()}; }

// States before and after each step, and what was drawn.
struct Imagination {
  LatentState before, after;  // [H·N, ·]
  Tensor log_prob, entropy;   // [H, N]
};

Imagination Roll(const WorldModel& model, const LatentState& start, const BehaviorNoise& noise) {
  std::vector<Tensor> before_deter, before_stoch, after_deter, after_stoch, log_prob, entropy;
  LatentState state = Detached(start);
  for (int64_t t = 0; t < noise.action.size(0); ++t) {
    before_deter.push_back(state.deter);
    before_stoch.push_back(state.stoch);
    const ActionSample sample = SampleAction(model.config(), model.ActorOutputs(Detached(state)), noise.action[t]);
    const Predicted predicted = model.Predict(state, sample.action);
    state = {predicted.deter, model.latents().Sample(predicted.prior, noise.state[t])};
    after_deter.push_back(state.deter);
    after_stoch.push_back(state.stoch);
    log_prob.push_back(sample.log_prob);
    entropy.push_back(sample.entropy);
  }
  return {{at::cat(before_deter), at::cat(before_stoch)},
          {at::cat(after_deter), at::cat(after_stoch)},
          at::stack(log_prob),
          at::stack(entropy)};
}

}  // namespace

ActionSample SampleAction(const config::v1::Model& model, const Tensor& outputs, const Tensor& noise) {
  if (IsDiscrete(model)) {
    const Tensor log_p = at::log_softmax(outputs, -1), p = log_p.exp();
    const Tensor choice = (log_p.detach() + ToGumbel(noise)).argmax(-1, /*keepdim=*/true);
    const Tensor one_hot = at::zeros_like(p).scatter_(-1, choice, 1);
    return {one_hot + (p - p.detach()), log_p.gather(-1, choice).squeeze(-1), -(p * log_p).sum(-1)};
  }
  const double init = std::log(std::expm1(model.behavior().init_std()));
  const Tensor mean = Mean(outputs), std = at::softplus(outputs.chunk(2, -1)[1] + init) + kMinStd;
  const Tensor u = at::addcmul(mean, std, noise);
  return {at::tanh(u), LogProb(mean, std, u.detach()), -LogProb(mean, std, u)};
}

Tensor ModeAction(const config::v1::Model& model, const Tensor& outputs) {
  if (!IsDiscrete(model)) return at::tanh(Mean(outputs));
  return at::zeros_like(outputs).scatter_(-1, outputs.argmax(-1, /*keepdim=*/true), 1);
}

Tensor LambdaReturns(const Tensor& reward, const Tensor& value, const Tensor& proceed, const Tensor& bootstrap, double lambda) {
  std::vector<Tensor> returns(static_cast<size_t>(reward.size(0)));
  Tensor next = bootstrap;
  for (int64_t t = reward.size(0) - 1; t >= 0; --t) {
    next = reward[t] + proceed[t] * ((1 - lambda) * value[t] + lambda * next);
    returns[static_cast<size_t>(t)] = next;
  }
  return at::stack(returns);
}

BehaviorNoise DrawBehaviorNoise(const WorldModel& model, int64_t n, torch::Generator& generator) {
  const int64_t h = model.config().behavior().horizon();
  const auto options = at::TensorOptions(at::kFloat).device(generator.device());
  return {at::randn({h, n, model.action_size()}, generator, options),
          at::randn({h, n, model.stochastic_size()}, generator, options)};
}

BehaviorOutputs ImagineBehavior(const WorldModel& model, const LatentState& start, const BehaviorNoise& noise) {
  const Behavior& options = model.config().behavior();
  const at::IntArrayRef shape = noise.action.sizes().slice(0, 2);  // [H, N]
  const Imagination imagined = Roll(model, start, noise);
  const Tensor reward = model.Reward(imagined.after).view(shape);
  const Tensor proceed = options.discount() * model.Continue(imagined.after).view(shape);
  const Tensor after = model.Value(imagined.after).view(shape);

  BehaviorOutputs out;
  out.returns = LambdaReturns(reward, after, proceed, after[shape[0] - 1], options.lambda());
  out.values = model.Value(Detached(imagined.before)).view(shape);
  out.entropy = imagined.entropy;
  Tensor weight = at::ones_like(reward.detach());
  if (options.discount_weights()) weight.slice(0, 1).copy_(proceed.detach().slice(0, 0, -1).cumprod(0));
  const Tensor target = out.returns.detach();
  const Tensor gain = options.gradient() == Behavior::REINFORCE
                          ? imagined.log_prob * (target - out.values.detach())
                          : out.returns;
  out.loss_actor = -(weight * (gain + options.entropy_scale() * imagined.entropy)).mean();
  out.loss_value = 0.5 * (weight * (out.values - target).square()).mean();
  return out;
}

}  // namespace orrery
