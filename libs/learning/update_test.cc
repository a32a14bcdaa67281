#include "libs/learning/update.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "libs/base/status_matchers.h"
#include "libs/world_model/behavior.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;
using torch::Tensor;

constexpr char kModel[] =
    "deterministic_size: 8 stochastic_size: 3 hidden_size: 7 activation: ELU action { continuous { size: 2 } } "
    "modalities { name: 'v' vector { size: 4 layers: 1 hidden_size: 6 } } reward { layers: 1 hidden_size: 5 } "
    "objective { free_nats: 0 overshooting { distance: 3 scale: 0.5 } }";

constexpr char kBehavior[] =
    " behavior { horizon: 3 actor_layers: 1 actor_hidden_size: 5 value_layers: 1 value_hidden_size: 5 init_std: 1 discount: 0.5 }";

std::shared_ptr<WorldModel> MakeModel(const std::string& more = "") {
  auto config = ParseModel(kModel + more);
  EXPECT_OK(config);
  auto model = WorldModel::Create(*config, 1);
  EXPECT_OK(model);
  return *model;
}

torch::Generator Seeded(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

Batch MakeBatch(uint64_t seed) {
  torch::Generator g = Seeded(seed);
  Batch batch;
  batch.observations["v"] = at::randn({6, 3, 4}, g, at::kFloat);
  batch.action = at::rand({6, 3, 2}, g, at::kFloat);
  batch.reward = at::randn({6, 3}, g, at::kFloat);
  batch.is_first = at::zeros({6, 3}, at::kByte);
  return batch;
}

config::v1::Learning Options(double clip = 1000) {
  config::v1::Learning learning;
  learning.set_learning_rate(0.01);
  learning.set_gradient_clip(clip);
  return learning;
}

TensorMap Parameters(const WorldModel& model) {
  TensorMap parameters;
  for (const auto& p : model.named_parameters()) parameters[p.key()] = p.value().detach().clone();
  return parameters;
}

// The same names and numbers, bit for bit.
bool Same(const TensorMap& a, const TensorMap& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const auto& x, const auto& y) { return x.first == y.first && at::equal(x.second, y.second); });
}

TEST(ComputeLoss, IsTheGoldenLossWithItsGradients) {
  const Golden golden = LoadGolden("planet");
  ASSERT_OK_AND_ASSIGN(const LossAndGradients loss,
                       ComputeLoss(*golden.model, golden.batch(), golden.noise(), true, true));
  EXPECT_TRUE(Near(loss.outputs.loss_total, golden["expect/loss_total"]));
  EXPECT_TRUE(Near(loss.outputs.loss_overshooting, golden["expect/loss_overshooting"]));
  const auto parameters = golden.model->named_parameters();
  for (size_t i = 0; i < parameters.size(); ++i)
    EXPECT_TRUE(Near(loss.gradients[i], golden["expect_grad/" + parameters[i].key()])) << parameters[i].key();
}

TEST(ComputeLoss, NamesWhatDoesNotFit) {
  const auto model = MakeModel();
  const auto code = absl::StatusCode::kInvalidArgument;
  torch::Generator g = Seeded(1);
  const LossNoise noise = model->DrawNoise(6, 3, g, false);
  const auto expect = [&](const Batch& batch, const LossNoise& n, const std::string& message) {
    EXPECT_THAT(ComputeLoss(*model, batch, n, false, false), StatusIs(code, HasSubstr(message)));
  };
  Batch batch = MakeBatch(1);
  batch.action = at::zeros({6, 3, 5});
  expect(batch, noise, "action is Float [6, 3, 5]; expected Float [6, 3, 2]");
  batch = MakeBatch(1);
  batch.observations.clear();
  expect(batch, noise, "v is missing");
  batch = MakeBatch(1);
  batch.observations["w"] = batch.observations["v"];
  expect(batch, noise, "w is not a modality");
  batch = MakeBatch(1);
  batch.is_first = batch.is_first.to(at::kFloat);
  expect(batch, noise, "is_first is Float");
  batch = MakeBatch(1);
  batch.reward = Tensor();
  expect(batch, noise, "reward is not [T, B]");
  expect(MakeBatch(1), {noise.posterior, {}}, "noise overshooting is missing; expected Float [4, 6, 3, 3]");
  Updater updater(model, Options());
  EXPECT_THAT(updater.Update(batch, g), StatusIs(code, HasSubstr("reward")));
}

// Both ways of making an update: one waits for its numbers before it steps, the other one does not.
class UpdateTest : public ::testing::TestWithParam<bool> {
 protected:
  static UpdateResult Update(Updater& updater, const Batch& batch, torch::Generator& g) {
    if (!GetParam()) {
      const absl::StatusOr<UpdateResult> result = updater.Update(batch, g);
      EXPECT_OK(result);
      return result.value_or(UpdateResult());
    }
    const absl::StatusOr<Tensor> values = updater.Enqueue(batch, g);
    EXPECT_OK(values);
    return values.ok() ? updater.Read(*values) : UpdateResult();
  }
  // `model` learns as `reference`, of the same parameters, does with LibTorch's own Adam at those rates.
  static void ExpectAdam(const std::shared_ptr<WorldModel>& model, WorldModel& reference, const config::v1::Learning& learning,
                         const std::vector<double>& rates, const std::function<Batch(int)>& batch, double tolerance) {
    Updater updater(model, learning);
    const double clip = learning.gradient_clip();
    torch::optim::Adam adam(reference.parameters(), torch::optim::AdamOptions(0.01).eps(1e-4));
    torch::Generator g = Seeded(3), same = Seeded(3);
    for (int i = 0; i < static_cast<int>(rates.size()); ++i) {
      static_cast<torch::optim::AdamOptions&>(adam.param_groups()[0].options()).lr(rates[i]);
      const UpdateResult result = Update(updater, batch(i), g);
      const LossOutputs o = reference.Loss(batch(i), reference.DrawNoise(6, 3, same, false), false);
      adam.zero_grad();
      o.loss_total.backward();
      const double norm = torch::nn::utils::clip_grad_norm_(reference.parameters(), clip), loss = o.loss_total.item<double>();
      adam.step();
      EXPECT_NEAR(result.gradient_norm, norm, tolerance * norm);
      ASSERT_EQ(result.losses.count("total"), 1u);
      EXPECT_NEAR(result.losses.at("total"), loss, tolerance * std::max(1.0, loss));
      EXPECT_FALSE(result.skipped);
      EXPECT_NEAR(result.learning_rate, rates[i], 1e-12);
    }
    const TensorMap expected = Parameters(reference);
    for (const auto& [name, value] : Parameters(*model)) EXPECT_TRUE(Near(value, expected.at(name), tolerance)) << name;
  }
};

TEST_P(UpdateTest, StepsAsTorchsAdamDoes) {
  for (const double clip : {1000.0, 0.5})
    ExpectAdam(MakeModel(), *MakeModel(), Options(clip), std::vector<double>(5, 0.01), MakeBatch, 1e-4);
  Updater updater(MakeModel(), Options());
  torch::Generator g = Seeded(3);
  EXPECT_EQ(Update(updater, MakeBatch(1), g).losses.size(), 5u);
}

// Pictures lie in memory with their channels last, and gradients of convolutions may, too.
TEST_P(UpdateTest, StepsAsTorchsAdamDoesWithPictures) {
  constexpr char kPictures[] =
      "deterministic_size: 8 stochastic_size: 3 hidden_size: 7 action { continuous { size: 2 } } "
      "reward { layers: 1 hidden_size: 5 } modalities { name: 'i' image { height: 32 width: 32 channels: 3 depth: 2 } }";
  ASSERT_OK_AND_ASSIGN(const config::v1::Model config, ParseModel(kPictures));
  ASSERT_OK_AND_ASSIGN(const std::shared_ptr<WorldModel> model, WorldModel::Create(config, 1));
  ASSERT_OK_AND_ASSIGN(const std::shared_ptr<WorldModel> reference, WorldModel::Create(config, 1));
  model->UseWorkers(std::make_shared<RowWorkers>(1));
  const auto batch = [&](int i) {
    torch::Generator g = Seeded(i);
    Batch made = MakeBatch(static_cast<uint64_t>(i));
    made.observations = reference->Preprocess({{"i", at::randint(0, 256, {6, 3, 32, 32, 3}, g, at::kByte)}}, g);
    return made;
  };
  ExpectAdam(model, *reference, Options(), std::vector<double>(5, 0.01), batch, 1e-3);
}

// Rates computed by hand: half, whole, then three steps down to a tenth.
TEST_P(UpdateTest, StepsByTheRateSchedule) {
  config::v1::Learning learning = Options();
  learning.mutable_rate_schedule()->set_shape(config::v1::RateSchedule::LINEAR);
  learning.mutable_rate_schedule()->set_warm_up_updates(2);
  learning.mutable_rate_schedule()->set_decay_updates(3);
  learning.mutable_rate_schedule()->set_final_fraction(0.1);
  ExpectAdam(MakeModel(), *MakeModel(), learning, {0.005, 0.01, 0.007, 0.004, 0.001, 0.001}, MakeBatch, 1e-4);
}

// An update that is skipped does not move the schedule, and actor and value follow it, too.
TEST_P(UpdateTest, TheScheduleCountsUpdatesOfAllGroups) {
  config::v1::Learning learning = Options();
  learning.set_actor_learning_rate(0.02);
  learning.set_value_learning_rate(0.03);
  learning.mutable_rate_schedule()->set_warm_up_updates(4);
  const auto model = MakeModel(kBehavior);
  const TensorMap start = Parameters(*model);
  Updater updater(model, learning);
  torch::Generator g = Seeded(3);
  Batch bad = MakeBatch(2);
  bad.reward[0][0] = std::nanf("");
  EXPECT_TRUE(Update(updater, bad, g).skipped);
  EXPECT_NEAR(Update(updater, MakeBatch(1), g).learning_rate, 0.0025, 1e-12);
  // Adam's first step is the learning rate, a quarter of it here, wherever the gradient is far above epsilon.
  const TensorMap after = Parameters(*model);
  const auto step = [&](const std::string& name) { return (after.at(name) - start.at(name)).abs().max().item<double>(); };
  EXPECT_NEAR(step("value.out.bias"), 0.0075, 0.00075);
  EXPECT_GT(step("actor.out.weight"), 0);
  EXPECT_LE(step("actor.out.weight"), 0.005 + 1e-6);
  EXPECT_LE(step("reward.out.bias"), 0.0025 + 1e-6);
}

TEST(Updater, LossFalls) {
  const auto model = MakeModel();
  Updater updater(model, Options());
  torch::Generator g = Seeded(3);
  ASSERT_OK_AND_ASSIGN(const UpdateResult first, updater.Update(MakeBatch(1), g));
  for (int i = 0; i < 100; ++i) ASSERT_OK(updater.Update(MakeBatch(1), g));
  ASSERT_OK_AND_ASSIGN(const UpdateResult last, updater.Update(MakeBatch(1), g));
  EXPECT_LT(last.losses.at("total"), 0.8 * first.losses.at("total"));
  EXPECT_EQ(updater.steps(), 102);
}

TEST_P(UpdateTest, SkipsWhatIsNotFinite) {
  const auto model = MakeModel(kBehavior), straight = MakeModel(kBehavior);
  Updater updater(model, Options()), other(straight, Options());
  torch::Generator g = Seeded(3), same = Seeded(3);
  EXPECT_FALSE(Update(updater, MakeBatch(1), g).skipped);
  EXPECT_FALSE(Update(other, MakeBatch(1), same).skipped);
  const TensorMap before = Parameters(*model), state = updater.State();
  same.set_state(g.get_state());
  Batch bad = MakeBatch(2);
  bad.reward[0][0] = std::nanf("");
  EXPECT_TRUE(Update(updater, bad, g).skipped);
  EXPECT_TRUE(Same(before, Parameters(*model)));
  EXPECT_TRUE(Same(state, updater.State()));
  EXPECT_EQ(updater.steps(), 1);
  // The next one is the second step, as if there had been nothing between.
  g.set_state(same.get_state());
  EXPECT_FALSE(Update(updater, MakeBatch(3), g).skipped);
  EXPECT_FALSE(Update(other, MakeBatch(3), same).skipped);
  EXPECT_TRUE(Same(Parameters(*model), Parameters(*straight)));
  EXPECT_EQ(updater.steps(), 2);
}

// The model learns as without behaviour; actor and value step by their own losses and rates.
TEST(Updater, BehaviorLeavesTheModelAlone) {
  const auto model = MakeModel(kBehavior), plain = MakeModel();
  const TensorMap start = Parameters(*model);
  config::v1::Learning learning = Options();
  learning.set_actor_learning_rate(0.02);
  learning.set_value_learning_rate(0.03);
  Updater updater(model, learning), reference(plain, learning);
  torch::Generator g = Seeded(3), same = Seeded(3);
  ASSERT_OK_AND_ASSIGN(const UpdateResult result, updater.Update(MakeBatch(1), g));
  ASSERT_OK_AND_ASSIGN(const UpdateResult alone, reference.Update(MakeBatch(1), same));
  EXPECT_EQ(result.losses.at("total"), alone.losses.at("total"));
  EXPECT_EQ(result.gradient_norm, alone.gradient_norm);
  EXPECT_EQ(result.losses.count("actor") + result.losses.count("value"), 2u);
  const TensorMap after = Parameters(*model), expected = Parameters(*plain);
  for (const auto& [name, value] : expected) EXPECT_TRUE(at::equal(after.at(name), value)) << name;
  // Adam's first step is the learning rate, wherever the gradient is far above epsilon.
  const auto step = [&](const std::string& name) { return (after.at(name) - start.at(name)).abs().max().item<double>(); };
  EXPECT_NEAR(step("value.out.bias"), 0.03, 0.003);
  EXPECT_GT(step("actor.out.weight"), 0);
  EXPECT_LE(step("actor.out.weight"), 0.02 + 1e-6);
}

// Rewards are the first action: the actor learns to make it large.
TEST(Updater, ActorLearnsWhatIsRewarded) {
  const auto model = MakeModel(kBehavior);
  config::v1::Learning learning = Options();
  learning.set_actor_learning_rate(0.01);
  learning.set_value_learning_rate(0.01);
  Updater updater(model, learning);
  torch::Generator g = Seeded(3);
  const auto draw = [&](int i) {
    Batch batch = MakeBatch(i);
    batch.action = at::rand({6, 3, 2}, g, at::kFloat) * 2 - 1;
    batch.observations["v"] = at::cat({batch.action, batch.action}, -1);
    batch.reward = batch.action.select(-1, 0).clone();
    return batch;
  };
  for (int i = 0; i < 300; ++i) ASSERT_OK(updater.Update(draw(i), g));
  torch::NoGradGuard no_grad;
  const LossOutputs o = model->Loss(draw(1), model->DrawNoise(6, 3, g, false), false);
  const Tensor action = ModeAction(model->config(), model->ActorOutputs({o.deter.flatten(0, 1), o.stoch.flatten(0, 1)}));
  EXPECT_GT(action.select(1, 0).mean().item<double>(), 0.8);
}

TEST_P(UpdateTest, ResumesBitForBit) {
  const auto straight = MakeModel(kBehavior);
  Updater updater(straight, Options());
  torch::Generator g = Seeded(3);
  for (int i = 0; i < 3; ++i) Update(updater, MakeBatch(i), g);

  const auto resumed = MakeModel(kBehavior);
  const TensorMap parameters = Parameters(*straight);
  {
    torch::NoGradGuard no_grad;
    for (auto& p : resumed->named_parameters()) p.value().copy_(parameters.at(p.key()));
  }
  Updater second(resumed, Options());
  TensorMap state = updater.State();
  state["rng"] = g.get_state();
  ASSERT_OK(second.Restore(state));
  torch::Generator continued = Seeded(99);
  continued.set_state(state["rng"]);
  for (int i = 3; i < 6; ++i) {
    Update(updater, MakeBatch(i), g);
    Update(second, MakeBatch(i), continued);
  }
  EXPECT_TRUE(Same(Parameters(*straight), Parameters(*resumed)));
  EXPECT_EQ(second.steps(), 6);
}

INSTANTIATE_TEST_SUITE_P(Ways, UpdateTest, ::testing::Bool(),
                         [](const auto& way) { return std::string(way.param ? "Enqueued" : "AtOnce"); });

TEST(Updater, MixesBothWays) {
  const auto model = MakeModel(), reference = MakeModel();
  Updater updater(model, Options()), other(reference, Options());
  torch::Generator g = Seeded(3), same = Seeded(3);
  for (int i = 0; i < 4; ++i) {
    if (i % 2 == 0) {
      ASSERT_OK(updater.Update(MakeBatch(i), g));
    } else {
      ASSERT_OK_AND_ASSIGN(const Tensor values, updater.Enqueue(MakeBatch(i), g));
      updater.Read(values);
    }
    ASSERT_OK(other.Update(MakeBatch(i), same));
  }
  EXPECT_EQ(updater.steps(), 4);
  const TensorMap expected = Parameters(*reference);
  for (const auto& [name, value] : Parameters(*model)) EXPECT_TRUE(Near(value, expected.at(name), 1e-5)) << name;
}

TEST(Updater, RefusesAStateThatDoesNotFit) {
  const auto model = MakeModel();
  Updater updater(model, Options());
  torch::Generator g = Seeded(3);
  ASSERT_OK(updater.Update(MakeBatch(1), g));
  const TensorMap good = updater.State();
  const auto expect = [&](const TensorMap& state, const std::string& message) {
    EXPECT_THAT(updater.Restore(state), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
    EXPECT_TRUE(Same(good, updater.State()));
  };
  TensorMap state = good;
  state.erase("adam.v.reward.out.bias");
  expect(state, "adam.v.reward.out.bias is missing");
  state = good;
  state["adam.m.rssm.input.weight"] = at::zeros({2, 2});
  expect(state, "adam.m.rssm.input.weight is Float [2, 2]; expected Float [7, 5]");
  state = good;
  state["adam.m.reward.out.bias"] = at::full({1}, std::nanf(""));
  expect(state, "not finite");
  state = good;
  state.erase("adam.step");
  expect(state, "adam.step is missing");
  state = good;
  state["adam.m.decoder.w.bias"] = at::zeros({1});
  expect(state, "does not have");
}

}  // namespace
}  // namespace orrery
