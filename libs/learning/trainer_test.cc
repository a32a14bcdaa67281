#include "libs/learning/trainer.h"

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "libs/base/status_matchers.h"
#include "libs/learning/learning_testing.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

StoredBatch MakeStored() {
  StoredBatch batch;
  batch.observations["joints"] = torch::zeros({4, 2, kTestVector});
  batch.action = torch::zeros({4, 2, kTestActions});
  batch.reward = torch::zeros({4, 2});
  batch.is_first = torch::zeros({4, 2}, torch::kByte);
  return batch;
}

TEST(Trainer, NamesWhatABatchLacks) {
  config::v1::Model model = SmallModel(/*with_image=*/false);
  model.mutable_continue_head();
  ASSERT_OK_AND_ASSIGN(const auto trainer, Trainer::Create(model, config::v1::Learning(), 1, torch::kCPU, 1));
  const auto refused = [&](const StoredBatch& batch, const std::string& message) {
    EXPECT_THAT(trainer->Update(batch), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  StoredBatch batch = MakeStored();
  refused(batch, "the batch has no is_terminal");
  batch.is_terminal = torch::zeros({4, 2}, torch::kByte);
  EXPECT_OK(trainer->Update(batch));
  StoredBatch blind = batch;
  blind.observations.clear();
  refused(blind, "the batch has no modality \"joints\"");
  StoredBatch still = batch;
  still.action = torch::Tensor();
  refused(still, "the batch has no action");
}

StoredBatch Drawn(int64_t seed) {
  torch::Generator g = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed));
  StoredBatch batch = MakeStored();
  batch.observations["joints"] = at::randn({4, 2, kTestVector}, g, at::kFloat);
  batch.action = at::rand({4, 2, kTestActions}, g, at::kFloat);
  batch.reward = at::randn({4, 2}, g, at::kFloat);
  return batch;
}

std::unique_ptr<Trainer> MakeTrainer(const std::string& learning) {
  torch::set_num_threads(1);  // these models are too small to be worth more
  const config::v1::Experiment experiment = ParseExperiment("learning { " + learning + " }").value();
  return Trainer::Create(SmallModel(/*with_image=*/false), experiment.learning(), 1, torch::kCPU, 1).value();
}

TensorMap WeightsOf(const WorldModel& model) {
  TensorMap weights;
  for (const auto& parameter : model.named_parameters()) weights[parameter.key()] = parameter.value().detach().clone();
  return weights;
}

TEST(Trainer, PublishesTheModelUnlessWeightsAreAveraged) {
  const auto trainer = MakeTrainer("");
  EXPECT_EQ(&trainer->published(), &trainer->model());
  for (const auto& [name, tensor] : trainer->State()) EXPECT_NE(name.substr(0, 8), "average.") << tensor.sizes();
}

// Against sums in float64 over the weights after each update.
TEST(Trainer, PublishesTheMeanOfTheWeights) {
  const auto trainer = MakeTrainer("learning_rate: 0.05 weight_average_decay: 0.6"), plain = MakeTrainer("learning_rate: 0.05");
  std::map<std::string, torch::Tensor> sum;
  double shares = 0;
  for (int update = 1; update <= 5; ++update) {
    ASSERT_OK(trainer->Update(Drawn(update)));
    ASSERT_OK(plain->Update(Drawn(update)));
    const TensorMap weights = WeightsOf(trainer->model()), undisturbed = WeightsOf(plain->model());
    shares = 0.6 * shares + 1;
    for (const auto& [name, weight] : weights) {
      EXPECT_TRUE(torch::equal(weight, undisturbed.at(name))) << name << ": learning goes on with the weights themselves";
      torch::Tensor& total = sum[name];
      total = total.defined() ? 0.6 * total + weight.to(torch::kDouble) : weight.to(torch::kDouble);
    }
    for (const auto& [name, mean] : WeightsOf(trainer->published())) {
      EXPECT_TRUE(torch::allclose(mean.to(torch::kDouble), sum[name] / shares, 1e-5, 1e-7)) << name << " " << update;
    }
  }
  // A skipped update does not count.
  const TensorMap before = WeightsOf(trainer->published());
  StoredBatch bad = Drawn(6);
  bad.reward[0][0] = std::nanf("");
  ASSERT_OK_AND_ASSIGN(const UpdateResult skipped, trainer->Update(bad));
  EXPECT_TRUE(skipped.skipped);
  for (const auto& [name, mean] : WeightsOf(trainer->published())) EXPECT_TRUE(torch::equal(mean, before.at(name))) << name;
}

TEST(Trainer, ResumesScheduleAndMeanBitForBit) {
  const std::string learning =
      "rate_schedule { shape: COSINE warm_up_updates: 3 decay_updates: 4 final_fraction: 0.1 } weight_average_decay: 0.8";
  const auto straight = MakeTrainer(learning), resumed = MakeTrainer(learning);
  std::vector<double> rates;
  for (int update = 1; update <= 4; ++update) {
    ASSERT_OK_AND_ASSIGN(const UpdateResult result, straight->Update(Drawn(update)));
    rates.push_back(result.learning_rate);
  }
  // 1e-3 times 1/3, 2/3, 1 and 0.1 + 0.9 (1 + cos 45°) / 2.
  const std::vector<double> expected = {0.001 / 3, 0.002 / 3, 0.001, 0.00086819805};
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(rates[i], expected[i], 1e-11);
  ASSERT_OK(resumed->Restore(straight->State(), /*with_random=*/true));
  for (int update = 5; update <= 8; ++update) {
    ASSERT_OK_AND_ASSIGN(const UpdateResult a, straight->Update(Drawn(update)));
    ASSERT_OK_AND_ASSIGN(const UpdateResult b, resumed->Update(Drawn(update)));
    EXPECT_EQ(a.learning_rate, b.learning_rate);
  }
  const TensorMap a = straight->State(), b = resumed->State();
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, tensor] : a) EXPECT_TRUE(torch::equal(tensor, b.at(name))) << name;
  EXPECT_THAT(resumed->Restore(MakeTrainer("")->State(), true),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("without learning.weight_average_decay")));
  EXPECT_OK(MakeTrainer("")->Restore(a, true)) << "going on without the mean";
}

}  // namespace
}  // namespace orrery
