#include <ATen/CPUGeneratorImpl.h>

#include "libs/planning/planner.h"
#include "libs/planning/testing.h"
#include "libs/world_model/behavior.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;
using torch::Tensor;

class GoldenTest : public ::testing::TestWithParam<std::string> {};

TEST_P(GoldenTest, PlanMatches) {
  const Golden golden = LoadGolden(GetParam());
  ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(golden.planner, golden.config));
  const LatentState belief{golden["plan/deter"].unsqueeze(0), golden["plan/stoch"].unsqueeze(0)};
  const PlanNoise noise{golden["noise/plan_action"].unsqueeze(0), golden["noise/plan_state"].unsqueeze(0)};
  ASSERT_OK_AND_ASSIGN(const PlanResult plan, planner->PlanWithNoise(*golden.model, belief, noise));
  EXPECT_TRUE(Near(plan.mean[0], golden["expect/plan_mean"]));
  EXPECT_TRUE(Near(plan.std[0], golden["expect/plan_std"]));
  EXPECT_TRUE(at::equal(plan.action[0], plan.mean[0][0]));
}

INSTANTIATE_TEST_SUITE_P(Oracle, GoldenTest, ::testing::Values("planet", "planet_elu"));

// Plans of every algorithm with one small model.
class PlannerTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    golden_ = LoadGolden("planet_elu");
    ASSERT_OK_AND_ASSIGN(planner_, MakePlanner(ParsePlannerOrDie(GetParam()), golden_.config));
    torch::Generator g = at::make_generator<at::CPUGeneratorImpl>(3);
    belief_ = {at::rand({2, 15}, g, at::kFloat) * 2 - 1, at::randn({2, 7}, g, at::kFloat)};
  }
  LatentState Belief(int64_t i) const { return {belief_.deter.narrow(0, i, 1), belief_.stoch.narrow(0, i, 1)}; }
  PlanResult Plan(const PlanRequest& request) const {
    absl::StatusOr<PlanResult> plan = planner_->Plan(*golden_.model, request);
    EXPECT_OK(plan);
    return plan.value_or(PlanResult());
  }

  Golden golden_;
  std::unique_ptr<Planner> planner_;
  LatentState belief_;
};

TEST_P(PlannerTest, AgentsPlanTogetherAsTheyPlanAlone) {
  const int64_t h = planner_->warm_start_horizon();
  const Tensor previous = h > 0 ? at::full({2, h, 2}, 0.5) : Tensor(), has_previous = at::tensor({0, 1}).to(at::kBool);
  const PlanResult both = Plan({belief_, {11, 12}, previous, has_previous});
  for (int64_t i = 0; i < 2; ++i) {
    const PlanResult one = Plan({Belief(i), {static_cast<uint64_t>(11 + i)}, h > 0 ? previous.narrow(0, i, 1) : Tensor(),
                                 has_previous.narrow(0, i, 1)});
    EXPECT_TRUE(at::equal(both.action[i], one.action[0])) << i;
    EXPECT_TRUE(at::equal(both.mean[i], one.mean[0])) << i;
    EXPECT_TRUE(at::equal(both.std[i], one.std[0])) << i;
    EXPECT_TRUE(at::equal(both.predicted_return[i], one.predicted_return[0])) << i;
  }
  EXPECT_FALSE(Near(both.action[0], both.action[1], 1e-3));
  EXPECT_LE(both.action.abs().max().item<float>(), 1 + 1e-6);
  EXPECT_EQ(both.mean.sizes(), both.std.sizes());
  EXPECT_EQ(both.action.sizes(), at::IntArrayRef({2, 2}));
}

TEST_P(PlannerTest, NamesWhatDoesNotFit) {
  const auto invalid = [](const std::string& message) {
    return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message));
  };
  EXPECT_THAT(planner_->Plan(*golden_.model, {{at::zeros({1, 14}), at::zeros({1, 7})}, {1}}),
              invalid("deter is [1, 14]; expected [1, 15]"));
  EXPECT_THAT(planner_->Plan(*golden_.model, {belief_, {1}}), invalid("deter is [2, 15]; expected [1, 15]"));
  EXPECT_THAT(planner_->Plan(*golden_.model, {belief_, {1, 2}, {}, {}, at::ones({2, 2}, at::kBool)}),
              invalid("valid_actions is given; expected none for a continuous action"));
  if (planner_->warm_start_horizon() == 0) return;
  EXPECT_THAT(planner_->Plan(*golden_.model, {belief_, {1, 2}, at::zeros({2, 30, 2}), at::ones({2}, at::kBool)}),
              invalid("previous_plan is [2, 30, 2]; expected [2, 4, 2]"));
  EXPECT_THAT(planner_->Plan(*golden_.model, {belief_, {1, 2}, at::zeros({2, 4, 2}), {}}), invalid("has_previous is missing"));
}

INSTANTIATE_TEST_SUITE_P(
    Algorithms, PlannerTest,
    ::testing::Values("cem { horizon: 5 iterations: 3 candidates: 64 elites: 16 }",
                      "cem { horizon: 4 iterations: 3 candidates: 64 elites: 16 warm_start: true momentum: 0.1 discount: 0.9 "
                      "mean_latents: true early_stop_std: 0.5 }",
                      "icem { horizon: 4 iterations: 3 candidates: 64 elites: 16 }",
                      "mppi { horizon: 4 iterations: 3 candidates: 64 elites: 16 mean_latents: true }",
                      "genetic { horizon: 4 generations: 3 population: 6 simulations: 4 discount: 0.9 }",
                      "random_shooting { horizon: 4 candidates: 64 }", "random {}"));

// A model with an actor and a value.
class BehaviorPlannerTest : public ::testing::Test {
 protected:
  void Make(const std::string& action) {
    auto config = ParseModel(
        "deterministic_size: 5 stochastic_size: 3 hidden_size: 6 action { " + action + " } modalities { name: 'v' vector { size: 3 } } "
        "behavior { actor_layers: 1 actor_hidden_size: 5 value_layers: 1 value_hidden_size: 4 }");
    ASSERT_OK(config);
    ASSERT_OK_AND_ASSIGN(model_, WorldModel::Create(*config, 1));
    belief_ = {at::randn({2, 5}), at::randn({2, 3})};
  }
  absl::StatusOr<PlanResult> Plan(const std::string& planner, const Tensor& valid = {}) {
    const auto made = MakePlanner(ParsePlannerOrDie(planner), model_->config());
    if (!made.ok()) return made.status();
    const uint64_t seeds[] = {1, 2};
    return (*made)->Plan(*model_, {belief_, seeds, {}, {}, valid});
  }
  std::shared_ptr<WorldModel> model_;
  LatentState belief_;
};

TEST_F(BehaviorPlannerTest, ActorAnswersWithItsMode) {
  Make("continuous { size: 2 }");
  ASSERT_OK_AND_ASSIGN(const PlanResult plan, Plan("actor {}"));
  torch::NoGradGuard no_grad;
  EXPECT_TRUE(at::equal(plan.action, ModeAction(model_->config(), model_->ActorOutputs(belief_))));
  EXPECT_TRUE(at::equal(plan.predicted_return, model_->Value(belief_)));
}

TEST_F(BehaviorPlannerTest, ActorHonoursValidActions) {
  Make("discrete { size: 4 }");
  for (int only = 0; only < 4; ++only) {
    Tensor valid = at::zeros({2, 4}, at::kBool);
    valid.select(1, only).fill_(true);
    ASSERT_OK_AND_ASSIGN(const PlanResult plan, Plan("actor {}", valid));
    EXPECT_EQ(plan.action.select(1, only).sum().item<float>(), 2);
  }
}

// One iteration in which every candidate is the actor's: the plan is the best of them, and the actor saturates.
TEST_F(BehaviorPlannerTest, ProposalsTakePlacesOfCandidates) {
  Make("continuous { size: 2 }");
  {
    torch::NoGradGuard no_grad;
    model_->named_parameters()["actor.out.weight"].zero_();
    model_->named_parameters()["actor.out.bias"].copy_(at::tensor({5.0f, -5.0f, -20.0f, -20.0f}));
  }
  for (const char* planner : {"cem { horizon: 3 iterations: 1 candidates: 8 elites: 2 proposals: 8 }",
                              "mppi { horizon: 3 iterations: 1 candidates: 8 elites: 2 proposals: 8 }"}) {
    ASSERT_OK_AND_ASSIGN(const PlanResult plan, Plan(planner));
    EXPECT_TRUE(Near(plan.mean, at::tensor({1.0f, -1.0f}).expand({2, 3, 2}), 0.01)) << planner;
  }
}

TEST_F(BehaviorPlannerTest, TerminalValueCountsAtTheEnd) {
  Make("continuous { size: 2 }");
  const std::string cem = "cem { horizon: 3 iterations: 1 candidates: 8 elites: 8 discount: 0.5 mean_latents: true ";
  ASSERT_OK_AND_ASSIGN(const PlanResult without, Plan(cem + "}"));
  {
    torch::NoGradGuard no_grad;
    model_->named_parameters()["value.out.weight"].zero_();
    model_->named_parameters()["value.out.bias"].fill_(80);
  }
  ASSERT_OK_AND_ASSIGN(const PlanResult with, Plan(cem + "terminal_value: true }"));
  EXPECT_TRUE(Near(with.predicted_return, without.predicted_return + 10, 1e-4)) << "0.5³ · 80";
}

TEST(MakePlanner, NamesOptionsThatNeedBehavior) {
  const config::v1::Model model = LoadGolden("planet").config;
  for (const auto& [planner, message] : std::map<std::string, std::string>{
           {"actor {}", "actor: the model has no actor and value"},
           {"cem { proposals: 1 }", "cem.proposals: the model"},
           {"mppi { terminal_value: true }", "mppi.terminal_value: the model"}}) {
    EXPECT_THAT(MakePlanner(ParsePlannerOrDie(planner), model), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  }
}

// The model of the golden file with CEM's or another planner's options.
class ModelTest : public ::testing::Test {
 protected:
  PlanResult Plan(const std::string& planner, const PlanRequest& request) {
    const auto made = MakePlanner(ParsePlannerOrDie(planner), golden_.config);
    EXPECT_OK(made);
    absl::StatusOr<PlanResult> plan = (*made)->Plan(*golden_.model, request);
    EXPECT_OK(plan);
    return plan.value_or(PlanResult());
  }

  const Golden golden_ = LoadGolden("planet_elu");
  const LatentState belief_ = golden_.model->InitialState(1);
};

TEST_F(ModelTest, BeginsFromTheShiftedPlanOfThoseThatHaveOne) {
  const std::string warm = "cem { horizon: 4 iterations: 2 candidates: 64 elites: 8 warm_start: true }";
  const Tensor yes = at::ones({1}, at::kBool), no = at::zeros({1}, at::kBool);
  const PlanResult first = Plan(warm, {belief_, {1}});
  const Tensor shifted = ShiftPlan(first.mean);
  const PlanResult second = Plan(warm, {belief_, {2}, shifted, yes});
  const PlanResult cold = Plan(warm, {belief_, {2}});
  EXPECT_FALSE(Near(second.mean, cold.mean, 1e-3));
  EXPECT_TRUE(at::equal(Plan(warm, {belief_, {2}, shifted, no}).mean, cold.mean));
  const std::string anew = "cem { horizon: 4 iterations: 2 candidates: 64 elites: 8 }";
  EXPECT_TRUE(at::equal(Plan(anew, {belief_, {2}, shifted, yes}).mean, cold.mean)) << "not asked for";
  // Drawn with the same numbers around another mean, the first iteration's plans differ by just that mean.
  const std::string narrow = "mppi { horizon: 4 iterations: 1 candidates: 64 elites: 64 max_std: 0.001 min_std: 0 }";
  EXPECT_LT((Plan(narrow, {belief_, {2}, 0.5 * shifted, yes}).mean - 0.5 * shifted).abs().max().item<float>(), 0.005);
}

TEST_F(ModelTest, DiscountAndMeanLatentsReachTheModel) {
  // All plans are alike, so that the predicted return is the return of zeros.
  const auto predicted = [&](const std::string& options) {
    return Plan("mppi { horizon: 3 iterations: 1 candidates: 2 elites: 2 min_std: 0 max_std: 1e-12 " + options + " }",
                {belief_, {1}}).predicted_return.item<float>();
  };
  const auto returns = [&](double discount) {
    return golden_.model->ImaginedReturns(belief_, at::zeros({3, 1, 1, 2}), at::zeros({3, 1, 1, 7}),
                                          ReturnOptions{.discount = discount}).item<float>();
  };
  EXPECT_NEAR(predicted("mean_latents: true"), returns(1), 1e-4);
  EXPECT_NEAR(predicted("mean_latents: true discount: 0.5"), returns(0.5), 1e-4);
  EXPECT_GT(std::abs(returns(1) - returns(0.5)), 1e-3) << "the checks above say nothing";
  EXPECT_GT(std::abs(predicted("") - returns(1)), 1e-4) << "samples are not the mean";
}

TEST(ShiftPlan, DropsTheFirstActionAndRepeatsTheLast) {
  const Tensor plan = at::tensor({0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 1.0000001f}).view({1, 3, 2});
  EXPECT_TRUE(at::equal(ShiftPlan(plan), at::tensor({0.3f, 0.4f, 0.5f, 1.0f, 0.5f, 1.0f}).view({1, 3, 2})));
  EXPECT_TRUE(at::equal(ShiftPlan(plan.narrow(1, 0, 1)), plan.narrow(1, 0, 1)));
}

TEST(CemPlanner, NamesWrongNoise) {
  const Golden golden = LoadGolden("planet_elu");
  ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(golden.planner, golden.config));
  EXPECT_THAT(planner->PlanWithNoise(*golden.model, golden.model->InitialState(1), {at::zeros({1, 4, 5, 40, 2}), {}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("plan_state is missing")));
}

TEST(MakePlanner, RefusesWrongOptions) {
  const Golden golden = LoadGolden("planet_elu");
  config::v1::Planner wrong = golden.planner;
  wrong.mutable_cem()->set_elites(1000);
  EXPECT_THAT(MakePlanner(wrong, golden.config), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("elites")));
}

TEST(MakePlanner, WantsThePlansOfPlannersThatWarmStart) {
  const Golden golden = LoadGolden("planet_elu");
  const std::vector<std::pair<std::string, int64_t>> cases = {
      {"cem { horizon: 7 }", 0}, {"cem { horizon: 7 warm_start: true }", 7}, {"icem { horizon: 9 }", 9},
      {"mppi { horizon: 9 warm_start: false }", 0}, {"genetic {}", 0}, {"random_shooting {}", 0}, {"random {}", 0}, {"", 0}};
  for (const auto& [text, horizon] : cases) {
    ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(ParsePlannerOrDie(text), golden.config));
    EXPECT_EQ(planner->warm_start_horizon(), horizon) << text;
  }
}

TEST(RandomPlanner, DrawsFromTheSeedAlone) {
  const Golden golden = LoadGolden("planet_elu");
  ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(ParsePlannerOrDie("random {}"), golden.config));
  ASSERT_OK_AND_ASSIGN(const PlanResult two, planner->Plan(*golden.model, {golden.model->InitialState(2), {1, 2}}));
  ASSERT_OK_AND_ASSIGN(const PlanResult one, planner->Plan(*golden.model, {golden.model->InitialState(1), {2}}));
  EXPECT_TRUE(at::equal(two.action[1], one.action[0]));
  EXPECT_FALSE(at::equal(two.action[0], two.action[1]));
  EXPECT_LE(two.action.abs().max().item<float>(), 1);
  EXPECT_THAT(planner->PlanWithNoise(*golden.model, golden.model->InitialState(1), {}),
              StatusIs(absl::StatusCode::kUnimplemented));
}

// Three choices.
class DiscreteTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto config = ParseModel("action { discrete { size: 3 } } modalities { name: 'v' vector { size: 2 } }");
    ASSERT_OK(config);
    config_ = *config;
    ASSERT_OK_AND_ASSIGN(model_, WorldModel::Create(config_, 0));
  }
  config::v1::Model config_;
  std::shared_ptr<WorldModel> model_;
};

TEST_F(DiscreteTest, RandomActionsCoverTheChoices) {
  ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(ParsePlannerOrDie("random {}"), config_));
  std::vector<uint64_t> seeds;
  for (uint64_t i = 0; i < 60; ++i) seeds.push_back(i);
  ASSERT_OK_AND_ASSIGN(const PlanResult plan, planner->Plan(*model_, {model_->InitialState(60), seeds}));
  EXPECT_TRUE(at::equal(plan.action.sum(1), at::ones({60})));
  EXPECT_GT(plan.action.sum(0).min().item<float>(), 5);
}

TEST_F(DiscreteTest, EveryPlannerKeepsToTheValidActions) {
  const Tensor valid = at::tensor({0, 1, 0, 1, 1, 1, 1, 0, 1}).view({3, 3}).to(at::kBool);
  for (const char* text : {"cem { horizon: 3 iterations: 2 candidates: 16 elites: 4 }", "random {}",
                           "genetic { horizon: 3 generations: 3 population: 4 simulations: 2 }",
                           "random_shooting { horizon: 3 candidates: 16 }"}) {
    ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(ParsePlannerOrDie(text), config_));
    for (uint64_t seed = 0; seed < 20; ++seed) {
      ASSERT_OK_AND_ASSIGN(const PlanResult plan,
                           planner->Plan(*model_, {model_->InitialState(3), {seed, seed + 100, seed + 200}, {}, {}, valid}));
      EXPECT_TRUE(at::equal(plan.action.sum(1), at::ones({3}))) << text;
      EXPECT_EQ(plan.action.masked_fill(valid, 0).sum().item<float>(), 0) << text;
    }
    EXPECT_THAT(planner->Plan(*model_, {model_->InitialState(1), {1}, {}, {}, at::zeros({1, 3}, at::kBool)}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("valid_actions has an agent without a valid action")));
    EXPECT_THAT(planner->Plan(*model_, {model_->InitialState(1), {1}, {}, {}, at::ones({1, 4}, at::kBool)}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("valid_actions is [1, 4]; expected [1, 3]")));
  }
}

TEST_F(DiscreteTest, RefusesPlannersOfContinuousActions) {
  EXPECT_THAT(MakePlanner(ParsePlannerOrDie("icem {}"), config_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("icem: plans continuous actions only")));
  EXPECT_THAT(MakePlanner(ParsePlannerOrDie("mppi {}"), config_),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("mppi: plans continuous actions only")));
}

}  // namespace
}  // namespace orrery
