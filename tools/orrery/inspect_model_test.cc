#include "tools/orrery/inspect_model.h"

#include <sstream>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/world_model/golden.h"
#include "libs/world_model/snapshot.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

// The golden case as files made by another program: only the model (and planner) in the metadata.
class InspectModel : public ::testing::Test {
 protected:
  void SetUp() override {
    SafeTensors snapshot, batch, noise, state, plan_noise;
    for (const auto& p : golden_.model->named_parameters()) snapshot.tensors[p.key()] = p.value().detach();
    snapshot.metadata = {{"orrery.model", ToText(golden_.config)}, {"orrery.planner", ToText(golden_.planner)}};
    for (const char* name : {"image", "action", "reward", "is_first"})
      batch.tensors[name] = golden_[std::string("batch/") + name];
    for (const char* name : {"posterior", "overshooting"}) noise.tensors[name] = golden_[std::string("noise/") + name];
    for (const char* name : {"deter", "stoch"}) state.tensors[name] = golden_[std::string("plan/") + name];
    for (const char* name : {"plan_action", "plan_state"})
      plan_noise.tensors[name] = golden_[std::string("noise/") + name];
    ASSERT_OK(SaveSafeTensors(dir_ / "snapshot", snapshot));
    ASSERT_OK(SaveSafeTensors(dir_ / "batch", batch));
    ASSERT_OK(SaveSafeTensors(dir_ / "noise", noise));
    ASSERT_OK(SaveSafeTensors(dir_ / "state", state));
    ASSERT_OK(SaveSafeTensors(dir_ / "plan_noise", plan_noise));
  }
  TensorMap Out() {
    auto file = LoadSafeTensors(dir_ / "out");
    EXPECT_OK(file);
    return file->tensors;
  }

  const Golden golden_ = LoadGolden("planet_elu");
  const TempDir dir_;
};

TEST_F(InspectModel, LossWritesEveryGoldenValueAndGradient) {
  ASSERT_OK(InspectLoss({dir_ / "snapshot", dir_ / "batch", dir_ / "out", dir_ / "noise", true}));
  const TensorMap out = Out();
  size_t compared = 0;
  for (const auto& [name, expected] : golden_.file.tensors) {
    std::string key;
    if (absl::StartsWith(name, "expect/") && !absl::StartsWith(name, "expect/plan")) key = name.substr(7);
    if (absl::StartsWith(name, "expect_grad/")) key = "grad." + name.substr(12);
    if (key.empty()) continue;
    ASSERT_TRUE(out.count(key)) << key;
    EXPECT_TRUE(Near(out.at(key), expected)) << key;
    ++compared;
  }
  EXPECT_EQ(compared, out.size());
}

// The value's last bias moves every value alike: its gradient is the mean of values - returns, by hand.
TEST_F(InspectModel, LossShowsActorAndValue) {
  auto config = golden_.config;
  config.mutable_behavior()->set_horizon(4);
  config.mutable_behavior()->set_discount_weights(false);
  const auto model = *WorldModel::Create(config, 1);
  SafeTensors snapshot, noise = *LoadSafeTensors(dir_ / "noise");
  for (const auto& p : model->named_parameters()) snapshot.tensors[p.key()] = p.value().detach();
  snapshot.metadata = {{"orrery.model", ToText(config)}};
  ASSERT_OK(SaveSafeTensors(dir_ / "agent", snapshot));
  ASSERT_OK(InspectLoss({dir_ / "agent", dir_ / "batch", dir_ / "out", dir_ / "noise", true}));
  EXPECT_FALSE(Out().count("loss_actor")) << "without noise for it";

  const int64_t rows = golden_["batch/reward"].numel();
  noise.tensors["behavior_action"] = at::randn({4, rows, ActionSize(config)});
  ASSERT_OK(SaveSafeTensors(dir_ / "half", noise));
  EXPECT_THAT(InspectLoss({dir_ / "agent", dir_ / "batch", dir_ / "out", dir_ / "half", true}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("behavior_state is missing")));
  noise.tensors["behavior_state"] = at::randn({4, rows, model->stochastic_size()});
  ASSERT_OK(SaveSafeTensors(dir_ / "all", noise));
  ASSERT_OK(InspectLoss({dir_ / "agent", dir_ / "batch", dir_ / "out", dir_ / "all", true}));
  const TensorMap out = Out();
  const torch::Tensor difference = out.at("behavior_values") - out.at("behavior_returns");
  EXPECT_TRUE(Near(out.at("loss_value"), 0.5 * difference.square().mean(), 1e-5));
  EXPECT_TRUE(Near(out.at("grad.value.out.bias"), difference.mean().view({1}), 1e-4));
  EXPECT_TRUE(Near(out.at("loss_actor"), -out.at("behavior_returns").mean(), 1e-5));
  EXPECT_GT(out.at("grad.actor.out.weight").abs().max().item<double>(), 0);
  ASSERT_OK(InspectLoss({dir_ / "agent", dir_ / "batch", dir_ / "out", dir_ / "all", false}));
  EXPECT_TRUE(at::equal(Out().at("loss_actor"), out.at("loss_actor")));
  EXPECT_FALSE(Out().count("grad.actor.out.weight"));
}

TEST_F(InspectModel, PlanMatches) {
  ASSERT_OK(InspectPlan({dir_ / "snapshot", dir_ / "state", dir_ / "out", dir_ / "plan_noise"}));
  EXPECT_TRUE(Near(Out().at("plan_mean"), golden_["expect/plan_mean"]));
  EXPECT_TRUE(Near(Out().at("plan_std"), golden_["expect/plan_std"]));
  ASSERT_OK(InspectPlan({dir_ / "snapshot", dir_ / "state", dir_ / "out", "7"}));
  const torch::Tensor first = Out().at("plan_mean");
  ASSERT_OK(InspectPlan({dir_ / "snapshot", dir_ / "state", dir_ / "out", "7"}));
  EXPECT_TRUE(at::equal(first, Out().at("plan_mean")));
  EXPECT_THAT(InspectPlan({dir_ / "snapshot", dir_ / "state", dir_ / "out", "zero"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("needs noise")));
}

TEST_F(InspectModel, TakesStoredPictures) {
  SafeTensors batch = *LoadSafeTensors(dir_ / "batch");
  const torch::Tensor stored = at::randint(256, {6, 3, 64, 64, 3}, at::kByte);
  batch.tensors["image"] = stored;
  ASSERT_OK(SaveSafeTensors(dir_ / "stored", batch));
  batch.tensors["image"] = stored.movedim(-1, 2).contiguous();
  ASSERT_OK(SaveSafeTensors(dir_ / "moved", batch));
  batch.tensors["image"] = golden_.model->Preprocess({{"image", stored}}, c10::nullopt).at("image").contiguous();
  ASSERT_OK(SaveSafeTensors(dir_ / "ready", batch));
  std::vector<torch::Tensor> losses;
  for (const char* name : {"stored", "moved", "ready"}) {
    ASSERT_OK(InspectLoss({dir_ / "snapshot", dir_ / name, dir_ / "out", dir_ / "noise", false}));
    losses.push_back(Out().at("loss_total"));
  }
  EXPECT_TRUE(Near(losses[0], losses[2], 1e-6));
  EXPECT_TRUE(Near(losses[1], losses[2], 1e-6));
}

TEST_F(InspectModel, ImaginesFromTheContext) {
  ASSERT_OK(InspectImagine({dir_ / "snapshot", dir_ / "batch", dir_ / "out", "zero", 2}));
  const TensorMap out = Out();
  EXPECT_EQ(out.at("recon").sizes(), (at::IntArrayRef{6, 3, 3, 64, 64}));
  EXPECT_EQ(out.at("reward_mean").sizes(), (at::IntArrayRef{6, 3}));
  ASSERT_OK(InspectLoss({dir_ / "snapshot", dir_ / "batch", dir_ / "out", "zero", false}));
  const torch::Tensor filtered = Out().at("recon");
  EXPECT_TRUE(Near(out.at("recon").slice(0, 0, 2), filtered.slice(0, 0, 2), 1e-5));
  EXPECT_FALSE(Near(out.at("recon")[2], filtered[2], 1e-5));
  EXPECT_THAT(InspectImagine({dir_ / "snapshot", dir_ / "batch", dir_ / "out", "zero", 7}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("context is 7; expected 1 to 6")));
}

TEST_F(InspectModel, SnapshotListsTensorsAndMetadata) {
  std::ostringstream text;
  ASSERT_OK(InspectSnapshot(dir_ / "snapshot", text));
  EXPECT_THAT(text.str(), HasSubstr("encoder.image.conv1.weight"));
  EXPECT_THAT(text.str(), HasSubstr("[45, 18]"));
  EXPECT_THAT(text.str(), HasSubstr("deterministic_size: 15"));
}

TEST_F(InspectModel, NamesWhatIsWrong) {
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(InspectLoss({dir_ / "snapshot", dir_ / "batch", dir_ / "out", dir_ / "none", false}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  EXPECT_THAT(InspectLoss({dir_ / "snapshot", dir_ / "batch", dir_ / "out", dir_ / "state", false}),
              StatusIs(invalid, HasSubstr("noise posterior is missing; expected Float [6, 3, 7]")));
  EXPECT_THAT(InspectLoss({dir_ / "snapshot", dir_ / "state", dir_ / "out", "zero", false}),
              StatusIs(invalid, HasSubstr("image is missing")));
  EXPECT_THAT(InspectLoss({dir_ / "batch", dir_ / "batch", dir_ / "out", "zero", false}),
              StatusIs(invalid, HasSubstr("orrery.model is missing")));
  SafeTensors batch = *LoadSafeTensors(dir_ / "batch");
  batch.tensors["image"] = at::zeros({6, 3, 64, 64, 4}, at::kByte);
  ASSERT_OK(SaveSafeTensors(dir_ / "wrong", batch));
  EXPECT_THAT(InspectLoss({dir_ / "snapshot", dir_ / "wrong", dir_ / "out", "zero", false}),
              StatusIs(invalid, HasSubstr("image is uint8 [6, 3, 64, 64, 4]; expected [T, B, 64, 64, 3]")));
}

}  // namespace
}  // namespace orrery
