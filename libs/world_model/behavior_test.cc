#include "libs/world_model/behavior.h"

#include <cmath>

#include "absl/strings/match.h"
#include "libs/base/status_matchers.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using config::v1::Model;
using torch::Tensor;

Model Small(const std::string& action, const std::string& behavior) {
  auto model = ParseModel(
      "deterministic_size: 5 stochastic_size: 3 hidden_size: 6 activation: ELU action { " + action + " } "
      "modalities { name: 'v' vector { size: 3 layers: 1 hidden_size: 4 } } reward { layers: 1 hidden_size: 4 } "
      "continue_head { layers: 1 hidden_size: 3 } "
      "behavior { actor_layers: 1 actor_hidden_size: 5 value_layers: 1 value_hidden_size: 4 init_std: 1 " + behavior + " }");
  EXPECT_OK(model);
  return *model;
}

std::shared_ptr<WorldModel> Make(const Model& config) {
  auto model = WorldModel::Create(config, 1);
  EXPECT_OK(model);
  (*model)->to(at::kDouble);
  return *model;
}

BehaviorNoise Noise(const WorldModel& model, int64_t n) {
  torch::Generator g = at::make_generator<at::CPUGeneratorImpl>(3);
  BehaviorNoise noise = DrawBehaviorNoise(model, n, g);
  return {noise.action.to(at::kDouble), noise.state.to(at::kDouble)};
}

TEST(LambdaReturns, AreTheDocumentations) {
  const Tensor r = at::tensor({1.0, 2.0, 3.0}, at::kDouble), v = at::tensor({10.0, 20.0, 30.0}, at::kDouble);
  const Tensor g = LambdaReturns(r, v, at::full({3}, 0.5, at::kDouble), v[2], 0.5);
  EXPECT_TRUE(Near(g, at::tensor({6.375, 11.5, 18.0}, at::kDouble), 1e-12));
}

// Against the objective written out by its definition: returns from the end, weights from the beginning.
TEST(Behavior, LossFollowsItsDefinition) {
  const auto model = Make(Small("continuous { size: 2 }", "horizon: 4 entropy_scale: 0.1 discount: 0.9"));
  const LatentState start{at::randn({3, 5}, at::kDouble), at::randn({3, 3}, at::kDouble)};
  const BehaviorNoise noise = Noise(*model, 3);
  const auto imagined = [&] {
    LatentState state = start;
    std::vector<Tensor> reward, value, c, entropy;
    for (int t = 0; t < 4; ++t) {
      const ActionSample a = SampleAction(model->config(), model->ActorOutputs(state), noise.action[t]);
      const Predicted p = model->Predict(state, a.action);
      state = {p.deter, p.prior.mean + p.prior.std * noise.state[t]};
      reward.push_back(model->Reward(state));
      value.push_back(model->Value(state));
      c.push_back(0.9 * model->Continue(state));
      entropy.push_back(a.entropy);
    }
    return std::make_tuple(at::stack(reward), at::stack(value), at::stack(c), at::stack(entropy));
  };
  const BehaviorOutputs out = ImagineBehavior(*model, start, noise);
  const auto [reward, value, c, entropy] = imagined();
  Tensor expected = at::zeros({}, at::kDouble), g = value[3], weight = at::ones({3}, at::kDouble);
  std::vector<Tensor> returns(4);
  for (int t = 3; t >= 0; --t) returns[t] = g = reward[t] + c[t] * (0.05 * value[t] + 0.95 * g);
  for (int t = 0; t < 4; ++t) {
    EXPECT_TRUE(Near(out.returns[t], returns[t], 1e-10));
    expected = expected - (weight * (returns[t] + 0.1 * entropy[t])).sum() / 12;
    weight = weight * c[t];
  }
  EXPECT_TRUE(Near(out.loss_actor, expected, 1e-10));
}

// One step, where the actor sees a constant state: the whole gradient is that of differences.
TEST(Behavior, ActorsGradientOfOneStepIsFiniteDifferences) {
  const auto model = Make(Small("continuous { size: 2 }", "horizon: 1"));
  const LatentState start{at::randn({3, 5}, at::kDouble), at::randn({3, 3}, at::kDouble)};
  const BehaviorNoise noise = Noise(*model, 3);
  torch::OrderedDict<std::string, Tensor> actor;
  for (const auto& parameter : model->named_parameters())
    if (absl::StartsWith(parameter.key(), "actor.")) actor.insert(parameter.key(), parameter.value());
  EXPECT_EQ(actor.size(), 4u);
  ExpectFiniteDifferences(actor, [&] { return ImagineBehavior(*model, start, noise).loss_actor; });
}

TEST(Behavior, ValueLearnsTheReturnsAsConstants) {
  const auto model = Make(Small("continuous { size: 2 }", "horizon: 4 discount_weights: false"));
  const LatentState start{at::randn({3, 5}, at::kDouble), at::randn({3, 3}, at::kDouble)};
  const BehaviorOutputs out = ImagineBehavior(*model, start, Noise(*model, 3));
  EXPECT_TRUE(Near(out.loss_value, 0.5 * (out.values - out.returns).square().mean(), 1e-12));
  EXPECT_TRUE(Near(out.values[0], model->Value(start), 1e-12));
  const Tensor bias = model->named_parameters()["value.out.bias"];
  EXPECT_TRUE(Near(torch::autograd::grad({out.loss_value}, {bias})[0], (out.values - out.returns).mean().view({1}), 1e-10));
}

TEST(Behavior, TanhNormalHasItsDensity) {
  const Model config = Small("continuous { size: 1 }", "");
  const Tensor outputs = at::tensor({0.4, -0.3}, at::kDouble).view({1, 2});
  // Numeric integration of exp(log_prob) over actions: u = mean + std z on a fine grid, da = (1 - a²) du.
  const Tensor z = at::linspace(-8, 8, 4001, at::kDouble).view({-1, 1});
  const ActionSample s = SampleAction(config, outputs.expand({4001, 2}), z);
  const double std = std::log1p(std::exp(-0.3 + std::log(std::expm1(1.0)))) + 1e-4, du = 16.0 / 4000 * std;
  const Tensor a = s.action.squeeze(-1);
  EXPECT_NEAR((s.log_prob.exp() * (1 - a.square()) * du).sum().item<double>(), 1, 1e-6);
  EXPECT_NEAR(ModeAction(config, outputs).item<double>(), std::tanh(5 * std::tanh(0.4 / 5)), 1e-12);
}

TEST(Behavior, DiscreteActionsAreOneHotAndReinforceFollowsTheAdvantage) {
  const Model config = Small("discrete { size: 3 }", "horizon: 1 gradient: REINFORCE discount_weights: false");
  const auto model = Make(config);
  const LatentState start{at::randn({2, 5}, at::kDouble), at::randn({2, 3}, at::kDouble)};
  const BehaviorNoise noise = Noise(*model, 2);
  const BehaviorOutputs out = ImagineBehavior(*model, start, noise);
  const Tensor logits = model->ActorOutputs(start);
  const ActionSample sample = SampleAction(config, logits, noise.action[0]);
  EXPECT_TRUE(Near(sample.action.detach().sum(-1), at::ones({2}, at::kDouble), 1e-12));
  const Tensor advantage = (out.returns - out.values).detach()[0];
  const Tensor expected = torch::autograd::grad({-(sample.log_prob * advantage).mean()}, {model->named_parameters()["actor.out.weight"]})[0];
  EXPECT_TRUE(Near(torch::autograd::grad({out.loss_actor}, {model->named_parameters()["actor.out.weight"]})[0], expected, 1e-10));
  const Tensor p = at::softmax(logits, -1).detach();
  EXPECT_TRUE(Near(sample.entropy, -(p * p.log()).sum(-1), 1e-10));
}

}  // namespace
}  // namespace orrery
