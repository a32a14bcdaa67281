// What is computed on a GPU against the CPU, and what is replayed as a graph against what is not. Needs a GPU; built with
// ORRERY_CUDA only.
#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libs/base/status_matchers.h"
#include "libs/device/captured_step.h"
#include "libs/learning/learning_testing.h"
#include "libs/learning/mirror.h"
#include "libs/learning/trainer.h"
#include "libs/planning/planner.h"
#include "libs/serving/engine.h"
#include "libs/serving/snapshot_holder.h"
#include "libs/serving/testing.h"

namespace orrery {
namespace {

using torch::Tensor;

constexpr int kRuns = 6;  // more than it takes until replays begin

torch::Generator Seeded(uint64_t seed) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

// Largest difference at most `tolerance` times the largest magnitude expected.
::testing::AssertionResult Near(const Tensor& actual, const Tensor& expected, double tolerance) {
  const Tensor a = actual.detach().to(at::kCPU, at::kDouble), e = expected.detach().to(at::kCPU, at::kDouble);
  if (a.sizes() != e.sizes()) return ::testing::AssertionFailure() << "shape " << a.sizes() << ", expected " << e.sizes();
  const double difference = (a - e).abs().max().item<double>(), scale = e.abs().max().item<double>();
  if (difference <= tolerance * std::max(scale, 1e-6)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "differs by " << difference << " where the largest magnitude is " << scale;
}

// Members of the family that take other ways through the model.
std::vector<std::pair<std::string, config::v1::Model>> Family() {
  std::vector<std::pair<std::string, config::v1::Model>> family = {{"planet", TinyModel()}};
  const auto add = [&](const std::string& name, const std::function<void(config::v1::Model&)>& change) {
    family.emplace_back(name, TinyModel());
    change(family.back().second);
  };
  add("overshooting", [](auto& m) {
    m.mutable_objective()->mutable_overshooting()->set_distance(3);
    m.mutable_objective()->mutable_overshooting()->set_scale(0.5);
  });
  add("modern", [](auto& m) {
    m.mutable_categorical()->set_groups(4);
    m.mutable_categorical()->set_classes(3);
    m.set_layer_norm(true);
    m.mutable_reward()->set_output(config::v1::RewardHead::TWO_HOT);
    m.mutable_continue_head();
    m.mutable_objective()->mutable_kl_balance();
  });
  add("mopoe", [](auto& m) { m.set_posterior(config::v1::Model::MOPOE); });
  add("dreamer", [](auto& m) { m.mutable_behavior()->set_horizon(3); });
  return family;
}

StoredBatch MakeStored(const config::v1::Model& model, uint64_t seed) {
  torch::Generator g = Seeded(seed);
  StoredBatch batch;
  batch.observations["image"] = at::randint(0, 256, {6, 4, 32, 32, 3}, g, at::kByte);
  batch.observations["joints"] = at::randn({6, 4, 3}, g, at::kFloat);
  batch.action = at::rand({6, 4, ActionSize(model)}, g, at::kFloat) * 2 - 1;
  batch.reward = at::randn({6, 4}, g, at::kFloat);
  batch.is_first = at::zeros({6, 4}, at::kByte);
  batch.is_first[3][1] = 1;
  batch.is_terminal = at::zeros({6, 4}, at::kByte);
  return batch;
}

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!torch::cuda::is_available()) GTEST_SKIP() << "there is no GPU";
    at::globalContext().setAllowTF32CuDNN(false);
    unsetenv("ORRERY_CUDA_GRAPHS");
  }
  // Graphs are made, or not, by what is made from now on.
  static void UseGraphs(bool use) { setenv("ORRERY_CUDA_GRAPHS", use ? "1" : "0", /*overwrite=*/1); }

  const torch::Device device_{torch::kCUDA, 0};
};

TEST_F(GpuTest, ReplaysDoWhatTheStepDoes) {
  std::vector<Tensor> results[2];
  for (const bool graphs : {false, true}) {
    UseGraphs(graphs);
    torch::Generator generator = at::globalContext().defaultGenerator(device_).clone();
    generator.set_current_seed(5);
    Tensor total = at::zeros({1000}, device_);
    int calls = 0;
    auto graph = MakeDeviceGraph(device_, {generator});
    ASSERT_EQ(graph != nullptr, graphs);
    CapturedStep step(
        device_,
        [&](const std::vector<Tensor>& in) {
          ++calls;
          torch::NoGradGuard no_grad;
          total.add_(in[0]);
          return std::vector<Tensor>{total + at::randn({1000}, generator, total.options())};
        },
        std::move(graph));
    for (int i = 0; i < kRuns; ++i) results[graphs].push_back(step.Run({at::full({1000}, static_cast<double>(i))})[0].cpu());
    EXPECT_EQ(calls, graphs ? CapturedStep::kWarmUps + 1 : kRuns);
  }
  for (int i = 0; i < kRuns; ++i) EXPECT_TRUE(at::equal(results[0][i], results[1][i])) << i;
  EXPECT_FALSE(at::equal(results[1][kRuns - 1] - results[1][kRuns - 2], at::full({1000}, kRuns - 1.0))) << "no new numbers";
}

// All of a batch, by name.
TensorMap TensorsOf(const StoredBatch& batch) {
  TensorMap tensors = batch.observations;
  tensors["action"] = batch.action;
  tensors["reward"] = batch.reward;
  tensors["is_first"] = batch.is_first;
  tensors["is_terminal"] = batch.is_terminal;
  return tensors;
}

// Copied beside a device that is busy: some are held until all have come, the memory of the others is used again.
TEST_F(GpuTest, BatchesArriveAsTheyLieOnTheHost) {
  Mirror::Options options;
  options.model = SmallModel(/*with_image=*/true);
  options.sequence_length = 8;
  options.max_rows = 1000;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Mirror> mirror, Mirror::Create(options));
  for (int64_t episode = 1; episode <= 3; ++episode) {
    ASSERT_OK(mirror->Apply(Appended(TestChunk(episode, 0, 30, /*with_image=*/true))));
  }
  MirroredSource host(mirror.get(), 16, /*seed=*/7), source(mirror.get(), 16, /*seed=*/7, device_);
  Tensor busy = at::randn({2048, 2048}, device_);
  std::vector<TensorMap> expected, arrived;
  for (int i = 0; i < 4 * kRuns; ++i) {
    ASSERT_OK_AND_ASSIGN(const StoredBatch there, source.Next(absl::InfiniteFuture()));
    source.Prefetch();
    for (int k = 0; k < 20; ++k) busy = at::mm(busy, busy).clamp_(-1, 1);
    ASSERT_OK_AND_ASSIGN(const StoredBatch here, host.Next(absl::InfiniteFuture()));
    expected.emplace_back();
    for (const auto& [name, tensor] : TensorsOf(here)) expected.back()[name] = tensor.clone();
    arrived.emplace_back();
    for (const auto& [name, tensor] : TensorsOf(there)) {
      ASSERT_EQ(tensor.device(), device_) << name;
      arrived.back()[name] = i % 2 == 0 ? tensor : tensor.cpu();  // behind the work that keeps the device busy
    }
  }
  for (size_t i = 0; i < arrived.size(); ++i) {
    ASSERT_EQ(arrived[i].size(), expected[i].size());
    for (const auto& [name, tensor] : expected[i]) {
      EXPECT_TRUE(at::equal(arrived[i].at(name).cpu(), tensor)) << i << " " << name;
    }
  }
}

TEST_F(GpuTest, LossAndGradientsAreThoseOfTheCpu) {
  for (const auto& [name, config] : Family()) {
    ASSERT_OK_AND_ASSIGN(const std::shared_ptr<WorldModel> model, WorldModel::Create(config, 1));
    torch::Generator g = Seeded(3);
    const StoredBatch stored = MakeStored(config, 2);
    Batch batch{model->Preprocess(stored.observations, g), stored.action, stored.reward, stored.is_first};
    batch.is_terminal = stored.is_terminal;
    LossNoise noise = model->DrawNoise(6, 4, g, true);
    ASSERT_OK_AND_ASSIGN(const LossAndGradients expected, ComputeLoss(*model, batch, noise, true, true));
    model->to(device_);
    for (auto& [key, x] : batch.observations) x = x.to(device_);
    for (Tensor* x : {&batch.action, &batch.reward, &batch.is_first, &batch.is_terminal, &noise.posterior, &noise.overshooting,
                      &noise.component, &noise.dropout}) {
      if (x->defined()) *x = x->to(device_);
    }
    ASSERT_OK_AND_ASSIGN(const LossAndGradients loss, ComputeLoss(*model, batch, noise, true, true));
    EXPECT_TRUE(Near(loss.outputs.loss_total, expected.outputs.loss_total, 1e-4)) << name;
    const auto parameters = model->named_parameters();
    ASSERT_EQ(loss.gradients.size(), expected.gradients.size());
    for (size_t i = 0; i < loss.gradients.size(); ++i)
      EXPECT_TRUE(Near(loss.gradients[i], expected.gradients[i], 2e-3)) << name << " " << parameters[i].key();
  }
}

// Parameters after some updates, the last of them after one that must be skipped and a return to an earlier state.
TensorMap Train(const config::v1::Model& config, torch::Device device) {
  config::v1::Learning learning;
  learning.set_learning_rate(1e-3);
  auto trainer = Trainer::Create(config, learning, 1, device, 1);
  EXPECT_OK(trainer);
  for (int i = 0; i < kRuns; ++i) {
    const auto result = (*trainer)->Update(MakeStored(config, static_cast<uint64_t>(i)));
    EXPECT_OK(result);
    EXPECT_FALSE(result.value_or(UpdateResult()).skipped);
  }
  const TensorMap state = (*trainer)->State();
  StoredBatch bad = MakeStored(config, 9);
  bad.reward[0][0] = std::nanf("");
  const auto result = (*trainer)->Update(bad);
  EXPECT_TRUE(result.ok() && result->skipped);
  const TensorMap skipped = (*trainer)->State();
  for (const auto& [name, value] : state) {
    if (name != "random.generator") {
      EXPECT_TRUE(at::equal(value, skipped.at(name))) << name;
    }
  }
  EXPECT_OK((*trainer)->Restore(state, /*with_random=*/true));
  EXPECT_OK((*trainer)->Update(MakeStored(config, 10)));
  return (*trainer)->State();
}

TEST_F(GpuTest, UpdatesThatAreReplayedAreThoseThatAreNot) {
  for (const auto& [name, config] : Family()) {
    UseGraphs(false);
    const TensorMap expected = Train(config, device_);
    UseGraphs(true);
    const TensorMap replayed = Train(config, device_);
    EXPECT_EQ(replayed.at("adam.step").item<int64_t>(), kRuns + 1) << name;
    EXPECT_TRUE(at::equal(replayed.at("random.generator"), expected.at("random.generator"))) << name;
    for (const auto& [key, value] : expected) {
      // Adam divides by the root of small second moments: sums in another order show.
      if (key.rfind("param.", 0) == 0) {
        EXPECT_TRUE(Near(replayed.at(key), value, 2e-3)) << name << " " << key;
      }
    }
  }
}

TEST_F(GpuTest, PlansThatAreReplayedAreThoseThatAreNot) {
  for (const char* text : {"cem { horizon: 5 iterations: 3 candidates: 200 elites: 20 }", "icem { horizon: 6 }", "mppi {}",
                           "genetic { generations: 3 }", "random_shooting { candidates: 100 }"}) {
    for (const auto& [name, config] : Family()) {
      ASSERT_OK_AND_ASSIGN(const config::v1::Planner planner, ParsePlanner(text));
      ASSERT_OK_AND_ASSIGN(const std::shared_ptr<WorldModel> model, WorldModel::Create(config, 1));
      model->to(device_);
      const c10::InferenceMode inference;
      const LatentState belief{at::rand({3, model->deterministic_size()}, device_),
                               at::randn({3, model->stochastic_size()}, device_)};
      const uint64_t seeds[] = {4, 5, 6};
      PlanResult plans[2];
      for (const bool graphs : {false, true}) {
        UseGraphs(graphs);
        ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Planner> made, MakePlanner(planner, config));
        for (int i = 0; i < kRuns; ++i) {
          ASSERT_OK_AND_ASSIGN(plans[graphs], made->Plan(*model, {belief, seeds}));
        }
      }
      EXPECT_TRUE(at::equal(plans[0].mean, plans[1].mean)) << text << " " << name;
      EXPECT_TRUE(at::equal(plans[0].predicted_return, plans[1].predicted_return)) << text << " " << name;
      EXPECT_FALSE(at::equal(plans[1].action[0], plans[1].action[1])) << text << " " << name;
    }
  }
}

TEST_F(GpuTest, PlansFollowTheParameters) {
  const config::v1::Model config = TinyModel();
  ASSERT_OK_AND_ASSIGN(const std::shared_ptr<WorldModel> model, WorldModel::Create(config, 1));
  ASSERT_OK_AND_ASSIGN(const std::shared_ptr<WorldModel> other, WorldModel::Create(config, 2));
  model->to(device_);
  other->to(device_);
  model->UseBfloat16();
  other->UseBfloat16();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Planner> planner, MakePlanner(TinyPlanner(), config));
  const uint64_t seeds[] = {4};
  const auto plan = [&](const WorldModel& with) {
    PlanResult result;
    for (int i = 0; i < kRuns; ++i) {
      auto made = planner->Plan(with, {with.InitialState(1), seeds});
      EXPECT_OK(made);
      result = made.value_or(PlanResult());
    }
    return result.mean;
  };
  const Tensor first = plan(*model), second = plan(*other);
  EXPECT_FALSE(at::equal(first, second));
  {
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < model->parameters().size(); ++i) model->parameters()[i].copy_(other->parameters()[i]);
  }
  EXPECT_TRUE(at::equal(plan(*model), second));
}

TEST_F(GpuTest, ReturnsAreThoseOfTheCpu) {
  for (const auto& [name, config] : Family()) {
    ASSERT_OK_AND_ASSIGN(const std::shared_ptr<WorldModel> model, WorldModel::Create(config, 1));
    torch::Generator g = Seeded(3);
    const LatentState start = model->InitialState(2);
    const Tensor actions = at::rand({5, 2, 60, 2}, g, at::kFloat) * 2 - 1;
    const Tensor noise = at::randn({5, 2, 60, model->stochastic_size()}, g, at::kFloat);
    const Tensor expected = model->ImaginedReturns(start, actions, noise, {.discount = 0.9});
    model->to(device_);
    const LatentState there{start.deter.to(device_), start.stoch.to(device_)};
    const auto returns = [&] {
      return model->ImaginedReturns(there, actions.to(device_), noise.to(device_), {.discount = 0.9});
    };
    // A class that is drawn otherwise by rounding, and the wide bins of two-hot rewards, leave only the first to be compared.
    if (!config.has_categorical()) {
      EXPECT_TRUE(Near(returns(), expected, 1e-3)) << name;
    }
    model->UseBfloat16();
    const Tensor low = returns();
    EXPECT_EQ(low.scalar_type(), at::kFloat) << name;
    EXPECT_TRUE(low.isfinite().all().item<bool>()) << name;
    if (!config.has_categorical()) {
      EXPECT_TRUE(Near(low, expected, 0.05)) << name;
    }
  }
}

TEST_F(GpuTest, ConvolutionsInBfloat16AreCloseToThoseInFloat32) {
  const config::v1::Model config = TinyModel();
  config::v1::Learning learning;
  double loss[2] = {};
  for (const bool low : {false, true}) {
    ASSERT_OK_AND_ASSIGN(const auto trainer, Trainer::Create(config, learning, 1, device_, 1, low));
    for (int i = 0; i < kRuns; ++i) {
      ASSERT_OK_AND_ASSIGN(const UpdateResult result, trainer->Update(MakeStored(config, 1)));
      loss[low] = result.losses.at("total");
    }
  }
  EXPECT_NE(loss[0], loss[1]);
  EXPECT_NEAR(loss[0], loss[1], 0.02 * loss[0]);
}

TEST_F(GpuTest, EngineAnswersOnTheGpu) {
  const auto registry = std::make_shared<prometheus::Registry>();
  const InferenceEngine engine(device_, registry);
  SnapshotHolder::Options options;
  options.device = device_;
  options.registry = registry;
  options.warm_up = [&](const ServedModel& served) { return engine.WarmUp(served, InferenceEngine::WarmUpsOn(device_, 4)); };
  options.warm_up_each = true;
  SnapshotHolder holder(options);
  ASSERT_OK(holder.Load(TinySnapshot(1)));
  const auto served = holder.Get();
  std::vector<SlotInput> slots(3);
  std::vector<const SlotInput*> pointers;
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i].observations = TinyObservation(i);
    slots[i].seed = i;
    pointers.push_back(&slots[i]);
  }
  std::vector<std::vector<float>> first;
  for (int run = 0; run < kRuns; ++run) {
    ASSERT_OK_AND_ASSIGN(const auto outputs, engine.Run(*served, pointers));
    std::vector<std::vector<float>> actions;
    for (const auto& output : outputs) {
      ASSERT_OK(output);
      actions.push_back(output->action);
    }
    if (run == 0) first = actions;
    EXPECT_EQ(actions, first) << run;
  }
}

}  // namespace
}  // namespace orrery
