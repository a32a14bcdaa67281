#include <limits>

#include "libs/base/status_matchers.h"
#include "libs/planning/cem.h"
#include "libs/planning/planner.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;
using torch::Tensor;

config::v1::Planner ParseOrDie(const std::string& text) {
  auto planner = ParsePlanner(text);
  EXPECT_OK(planner);
  return *planner;
}

// A problem whose plans are scored by a plain function of them.
CemProblem Scored(int64_t agents, int64_t actions, std::function<Tensor(const Tensor&)> score, const config::v1::Cem& cem) {
  auto generator = std::make_shared<torch::Generator>(at::make_generator<at::CPUGeneratorImpl>(5));
  CemProblem problem;
  problem.agents = agents;
  problem.action_size = actions;
  problem.draw = [=](int64_t) { return at::randn({cem.horizon(), agents, cem.candidates(), actions}, *generator, at::kFloat); };
  problem.objective = [=](const Tensor& plans, int64_t) { return score(plans); };
  return problem;
}

TEST(Cem, FindsTheMaximumOfAQuadratic) {
  const auto cem = ParseOrDie("cem { horizon: 3 candidates: 300 elites: 30 }").cem();
  const Tensor target = at::tensor({0.5, -0.3, 0.9, 0.0, -0.8, 0.1}).to(at::kFloat).view({3, 1, 1, 2});
  const PlanResult plan =
      RunCem(cem, Scored(1, 2, [&](const Tensor& p) { return -(p - target).square().sum(at::IntArrayRef{0, 3}); }, cem));
  EXPECT_LT((plan.mean[0] - target.view({3, 2})).abs().max().item<float>(), 0.1);
  EXPECT_TRUE(at::equal(plan.action, plan.mean.select(1, 0)));
  EXPECT_GT(plan.predicted_return.item<float>(), -0.1);
  EXPECT_EQ(plan.non_finite_plans, 0);
}

TEST(Cem, StandardDeviationStopsAtItsFloor) {
  const auto cem = ParseOrDie("cem { horizon: 1 candidates: 100 elites: 10 iterations: 20 std_floor: 0.25 }").cem();
  const PlanResult plan = RunCem(cem, Scored(1, 1, [](const Tensor& p) { return p.sum(at::IntArrayRef{0, 3}); }, cem));
  EXPECT_EQ(plan.std.item<float>(), 0.25);
}

TEST(Cem, ReturnsThatAreNotFiniteNeverWin) {
  const auto cem = ParseOrDie("cem { horizon: 1 candidates: 200 elites: 20 }").cem();
  // Everything above 0 overflows or is undefined; the best that is left is just below.
  const auto score = [](const Tensor& p) {
    const Tensor x = p.select(3, 0).select(0, 0);
    return x.masked_fill(x > 0, std::numeric_limits<float>::infinity()).masked_fill(x > 0.5, std::nanf(""));
  };
  const PlanResult plan = RunCem(cem, Scored(1, 1, score, cem));
  EXPECT_LE(plan.action.item<float>(), 0);
  EXPECT_GT(plan.action.item<float>(), -0.1);
  EXPECT_GT(plan.non_finite_plans, 50);
}

TEST(Cem, RefitsOnTheFewPlansThatAreFinite) {
  const auto cem = ParseOrDie("cem { horizon: 1 candidates: 8 elites: 6 iterations: 1 }").cem();
  CemProblem problem = Scored(1, 1, {}, cem);
  Tensor seen;
  problem.objective = [&](const Tensor& plans, int64_t) {
    seen = plans.view(-1).clone();
    Tensor returns = at::full({1, 8}, std::nanf(""));
    returns[0][2] = 1;
    returns[0][5] = 2;
    return returns;
  };
  const PlanResult plan = RunCem(cem, problem);
  const Tensor two = at::stack({seen[2], seen[5]});
  EXPECT_TRUE(Near(plan.mean.squeeze(), two.mean(), 1e-6));
  EXPECT_TRUE(Near(plan.std.squeeze(), (two.var(false) + 1e-6).sqrt(), 1e-5));
  EXPECT_EQ(plan.predicted_return.item<float>(), 1.5);
  EXPECT_EQ(plan.non_finite_plans, 6);
}

TEST(Cem, WithoutAFinitePlanTheMeanStays) {
  const auto cem = ParseOrDie("cem { horizon: 2 candidates: 10 elites: 4 iterations: 3 }").cem();
  // Agent 1 loses all its plans; agent 0 goes on.
  const auto score = [](const Tensor& p) {
    Tensor returns = p.sum(at::IntArrayRef{0, 3});
    returns[1].fill_(std::nanf(""));
    return returns;
  };
  const PlanResult plan = RunCem(cem, Scored(2, 1, score, cem));
  EXPECT_TRUE(at::equal(plan.mean[1], at::zeros({2, 1})));
  EXPECT_TRUE(at::equal(plan.std[1], at::ones({2, 1})));
  EXPECT_GT(plan.mean[0].min().item<float>(), 0.3);
  EXPECT_EQ(plan.non_finite_plans, 30);
  EXPECT_EQ(plan.predicted_return[1].item<float>(), -std::numeric_limits<float>::infinity());
}

TEST(Cem, ChoosesDiscreteActions) {
  const auto cem = ParseOrDie("cem { horizon: 3 candidates: 100 elites: 10 iterations: 8 }").cem();
  const Tensor best = at::tensor({2, 0, 3});
  CemProblem problem = Scored(1, 4, [&](const Tensor& p) {
    EXPECT_TRUE(at::equal(p.sum(-1), at::ones({3, 1, 100}))) << "not one-hot";
    return (p.argmax(-1) == best.view({3, 1, 1})).to(at::kFloat).sum(0);
  }, cem);
  problem.discrete = true;
  const PlanResult plan = RunCem(cem, problem);
  EXPECT_TRUE(at::equal(plan.mean[0].argmax(-1), best));
  EXPECT_TRUE(at::equal(plan.action, at::tensor({0.f, 0.f, 1.f, 0.f}).view({1, 4})));
  EXPECT_GT(plan.mean.min().item<float>(), 0.02) << "a choice has died out";
  EXPECT_TRUE(Near(plan.mean.sum(-1), at::ones({1, 3}), 1e-6));
}

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

TEST(CemPlanner, AgentsPlanTogetherAsTheyPlanAlone) {
  const Golden golden = LoadGolden("planet_elu");
  ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(golden.planner, golden.config));
  torch::Generator g = at::make_generator<at::CPUGeneratorImpl>(3);
  const LatentState belief{at::rand({3, 15}, g, at::kFloat) * 2 - 1, at::randn({3, 7}, g, at::kFloat)};
  ASSERT_OK_AND_ASSIGN(const PlanResult together, planner->Plan(*golden.model, belief, {11, 12, 13}));
  for (int64_t i = 0; i < 3; ++i) {
    const LatentState one{belief.deter.slice(0, i, i + 1), belief.stoch.slice(0, i, i + 1)};
    ASSERT_OK_AND_ASSIGN(const PlanResult alone, planner->Plan(*golden.model, one, {static_cast<uint64_t>(11 + i)}));
    EXPECT_TRUE(Near(together.mean[i], alone.mean[0], 1e-5)) << i;
    EXPECT_TRUE(Near(together.predicted_return[i], alone.predicted_return[0], 1e-5)) << i;
  }
  EXPECT_FALSE(Near(together.mean[0], together.mean[1], 1e-3));
}

TEST(CemPlanner, NamesWhatDoesNotFit) {
  const Golden golden = LoadGolden("planet_elu");
  ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(golden.planner, golden.config));
  EXPECT_THAT(planner->Plan(*golden.model, {at::zeros({1, 14}), at::zeros({1, 7})}, {1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("deter is [1, 14]; expected [1, 15]")));
  EXPECT_THAT(planner->PlanWithNoise(*golden.model, golden.model->InitialState(1), {at::zeros({1, 4, 5, 40, 2}), {}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("plan_state is missing")));
  config::v1::Planner wrong = golden.planner;
  wrong.mutable_cem()->set_elites(1000);
  EXPECT_THAT(MakePlanner(wrong, golden.config), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("elites")));
}

TEST(RandomPlanner, DrawsFromTheSeedAlone) {
  const Golden golden = LoadGolden("planet_elu");
  ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(ParseOrDie("random {}"), golden.config));
  ASSERT_OK_AND_ASSIGN(const PlanResult two, planner->Plan(*golden.model, golden.model->InitialState(2), {1, 2}));
  ASSERT_OK_AND_ASSIGN(const PlanResult one, planner->Plan(*golden.model, golden.model->InitialState(1), {2}));
  EXPECT_TRUE(at::equal(two.action[1], one.action[0]));
  EXPECT_FALSE(at::equal(two.action[0], two.action[1]));
  EXPECT_LE(two.action.abs().max().item<float>(), 1);
  EXPECT_THAT(planner->PlanWithNoise(*golden.model, golden.model->InitialState(1), {}),
              StatusIs(absl::StatusCode::kUnimplemented));
}

TEST(RandomPlanner, CoversDiscreteChoices) {
  auto config = ParseModel("action { discrete { size: 3 } } modalities { name: 'v' vector { size: 2 } }");
  ASSERT_OK(config);
  ASSERT_OK_AND_ASSIGN(const auto model, WorldModel::Create(*config, 0));
  ASSERT_OK_AND_ASSIGN(const auto planner, MakePlanner(ParseOrDie("random {}"), *config));
  std::vector<uint64_t> seeds;
  for (uint64_t i = 0; i < 60; ++i) seeds.push_back(i);
  ASSERT_OK_AND_ASSIGN(const PlanResult plan, planner->Plan(*model, model->InitialState(60), seeds));
  EXPECT_TRUE(at::equal(plan.action.sum(1), at::ones({60})));
  EXPECT_GT(plan.action.sum(0).min().item<float>(), 5);
}

}  // namespace
}  // namespace orrery
