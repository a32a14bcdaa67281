// Every configuration that is shipped can be learned from and planned with.
#include <gtest/gtest.h>

#include <filesystem>

#include "libs/base/random.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/config/config.h"
#include "libs/learning/complete_model.h"
#include "libs/learning/mirror.h"
#include "libs/learning/trainer.h"
#include "libs/planning/planner.h"

namespace orrery {
namespace {

std::vector<std::string> Presets() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(SourceFile("configs")))
    names.push_back(entry.path().stem().string());
  return names;
}

class PresetTest : public ::testing::TestWithParam<std::string> {};

// Two updates with the preset's own networks and a small batch, then one plan.
TEST_P(PresetTest, LearnsAndPlans) {
  ASSERT_OK_AND_ASSIGN(const config::v1::Experiment preset, LoadExperiment(SourceFile("configs/" + GetParam() + ".textproto")));
  ASSERT_OK_AND_ASSIGN(const config::v1::Experiment experiment, CompleteExperiment(preset));
  const config::v1::Model& model = experiment.model();
  ASSERT_OK_AND_ASSIGN(const auto trainer, Trainer::Create(model, experiment.learning(), 1, torch::kCPU, 2));
  const int64_t t = 5, b = 3;
  StoredBatch batch;
  for (const auto& m : model.modalities()) {
    const auto& image = m.image();
    batch.observations[m.name()] =
        m.has_image() ? torch::randint(256, {t, b, image.height(), image.width(), image.channels()}, torch::kUInt8)
                      : torch::randn({t, b, m.vector().size()});
  }
  batch.action = torch::rand({t, b, ActionSize(model)});
  batch.reward = torch::randn({t, b});
  batch.is_first = torch::zeros({t, b}, torch::kUInt8);
  batch.is_terminal = torch::zeros({t, b}, torch::kUInt8);
  for (int i = 0; i < 2; ++i) {
    ASSERT_OK_AND_ASSIGN(const UpdateResult result, trainer->Update(batch));
    EXPECT_FALSE(result.skipped);
  }
  ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(experiment.planner(), model));
  const uint64_t seeds[] = {1};
  ASSERT_OK_AND_ASSIGN(const PlanResult plan, planner->Plan(trainer->model(), {.belief = trainer->model().InitialState(1), .seeds = seeds}));
  EXPECT_EQ(plan.action.sizes(), (at::IntArrayRef{1, ActionSize(model)}));
  EXPECT_LE(plan.action.abs().max().item<float>(), 1);
  EXPECT_EQ(plan.non_finite_plans, 0);
}

TEST_P(PresetTest, FitsIntoTheMirror) {
  ASSERT_OK_AND_ASSIGN(const config::v1::Experiment preset, LoadExperiment(SourceFile("configs/" + GetParam() + ".textproto")));
  ASSERT_OK_AND_ASSIGN(const config::v1::Experiment experiment, CompleteExperiment(preset));
  Mirror::Options options;
  options.model = experiment.model();
  options.max_rows = experiment.replay().max_rows();
  options.max_bytes = experiment.learning().mirror_bytes();
  EXPECT_OK(Mirror::Create(options));
}

INSTANTIATE_TEST_SUITE_P(Configs, PresetTest, ::testing::ValuesIn(Presets()), [](const auto& which) { return which.param; });

}  // namespace
}  // namespace orrery
