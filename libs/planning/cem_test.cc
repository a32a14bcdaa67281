#include "libs/planning/cem.h"

#include <ATen/CPUGeneratorImpl.h>

#include "libs/planning/testing.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using torch::Tensor;

const float kInfinity = std::numeric_limits<float>::infinity();

config::v1::Cem ParseCem(const std::string& text) { return ParsePlannerOrDie("cem { " + text + " }").cem(); }

CemProblem CemScored(const std::vector<uint64_t>& seeds, int64_t action_size, std::function<Tensor(const Tensor&)> score) {
  return Scored<CemProblem>(seeds, action_size, std::move(score));
}

TEST(Cem, FindsTheMaximumOfAQuadratic) {
  const auto cem = ParseCem("horizon: 3 candidates: 300 elites: 30");
  const Tensor target = at::tensor({0.5, -0.3, 0.9, 0.0, -0.8, 0.1}).to(at::kFloat).view({3, 2});
  const PlanResult plan = RunCem(cem, CemScored({5}, 2, Towards(target)));
  EXPECT_LT((plan.mean[0] - target).abs().max().item<float>(), 0.1);
  EXPECT_TRUE(at::equal(plan.action, plan.mean.select(1, 0)));
  EXPECT_GT(plan.predicted_return.item<float>(), -0.1);
  EXPECT_EQ(plan.non_finite_plans, 0);
}

TEST(Cem, TakesGivenNoise) {
  const auto cem = ParseCem("horizon: 2 candidates: 4 elites: 1 iterations: 3");
  CemProblem problem;
  problem.draw = [](int64_t i) { return at::full({2, 1, 4, 1}, std::vector<double>{10, -20, 0}.at(static_cast<size_t>(i))); };
  std::vector<float> seen;
  problem.objective = [&](const Tensor& plans, int64_t i) {
    EXPECT_EQ(i, static_cast<int64_t>(seen.size()));
    seen.push_back(plans.max().item<float>());
    return plans.sum(at::IntArrayRef{0, 3});
  };
  RunCem(cem, problem);
  ASSERT_EQ(seen.size(), 3u);
  EXPECT_EQ(seen[0], 1) << "clipped";
  EXPECT_NEAR(seen[1], 0.98, 1e-5) << "the deviation is sqrt(1e-6) now";
  EXPECT_NEAR(seen[2], 0.98, 1e-5);
}

TEST(Cem, StandardDeviationStopsAtItsFloor) {
  const auto cem = ParseCem("horizon: 1 candidates: 100 elites: 10 iterations: 20 std_floor: 0.25");
  const PlanResult plan = RunCem(cem, CemScored({5}, 1, [](const Tensor& p) { return p.sum(at::IntArrayRef{0, 3}); }));
  EXPECT_EQ(plan.std.item<float>(), 0.25);
}

TEST(Cem, ReturnsThatAreNotFiniteNeverWin) {
  const auto cem = ParseCem("horizon: 1 candidates: 200 elites: 20");
  const PlanResult plan = RunCem(cem, CemScored({5}, 1, SumBelowZero));
  EXPECT_LE(plan.action.item<float>(), 0);
  EXPECT_GT(plan.action.item<float>(), -0.1);
  EXPECT_GT(plan.non_finite_plans, 50);
}

TEST(Cem, RefitsOnTheFewPlansThatAreFinite) {
  const auto cem = ParseCem("horizon: 1 candidates: 8 elites: 6 iterations: 1");
  CemProblem problem = CemScored({5}, 1, {});
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
  const auto cem = ParseCem("horizon: 2 candidates: 10 elites: 4 iterations: 3");
  torch::Generator generator = at::make_generator<at::CPUGeneratorImpl>(5);
  CemProblem problem;
  problem.agents = 2;
  problem.draw = [&](int64_t) { return at::randn({2, 2, 10, 1}, generator, at::kFloat); };
  // Agent 1 loses all its plans; agent 0 goes on.
  problem.objective = [](const Tensor& plans, int64_t) {
    Tensor returns = plans.sum(at::IntArrayRef{0, 3});
    returns[1].fill_(std::nanf(""));
    return returns;
  };
  const PlanResult plan = RunCem(cem, problem);
  EXPECT_TRUE(at::equal(plan.mean[1], at::zeros({2, 1})));
  EXPECT_TRUE(at::equal(plan.std[1], at::ones({2, 1})));
  EXPECT_GT(plan.mean[0].min().item<float>(), 0.3);
  EXPECT_EQ(plan.non_finite_plans, 30);
  EXPECT_EQ(plan.predicted_return[1].item<float>(), -kInfinity);
}

TEST(Cem, ChoosesDiscreteActions) {
  const auto cem = ParseCem("horizon: 3 candidates: 100 elites: 10 iterations: 8");
  const Tensor right = at::tensor({2, 0, 3});
  CemProblem problem = CemScored({5}, 4, RightChoices(right));
  problem.discrete = true;
  const PlanResult plan = RunCem(cem, problem);
  EXPECT_TRUE(at::equal(plan.mean[0].argmax(-1), right.to(at::kLong)));
  EXPECT_TRUE(at::equal(plan.action, at::tensor({0.f, 0.f, 1.f, 0.f}).view({1, 4})));
  EXPECT_GT(plan.mean.min().item<float>(), 0.02) << "a choice has died out";
  EXPECT_TRUE(Near(plan.mean.sum(-1), at::ones({1, 3}), 1e-6));
}

TEST(Cem, NeverPlansAnActionThatIsNotValid) {
  const auto cem = ParseCem("horizon: 3 candidates: 64 elites: 8 iterations: 6");
  // Agent 0 may not take what would be right, agent 1 may take anything.
  CemProblem problem = CemScored({5, 6}, 4, [](const Tensor& plans) {
    EXPECT_EQ(plans.select(1, 0).select(-1, 2).sum().item<float>(), 0);
    return plans.select(-1, 2).sum(0) + 0.5 * plans.select(-1, 1).sum(0);
  });
  problem.discrete = true;
  problem.valid_actions = at::tensor({1, 1, 0, 1, 1, 1, 1, 1}).view({2, 4}).to(at::kBool);
  const PlanResult plan = RunCem(cem, problem);
  EXPECT_TRUE(at::equal(plan.action[0], at::tensor({0.f, 1.f, 0.f, 0.f})));
  EXPECT_TRUE(at::equal(plan.action[1], at::tensor({0.f, 0.f, 1.f, 0.f})));
  EXPECT_TRUE(at::equal(plan.mean[0].select(-1, 2), at::zeros({3})));
  EXPECT_TRUE(Near(plan.mean.sum(-1), at::ones({2, 3}), 1e-6));
}

TEST(Cem, WithoutAFinitePlanADiscreteAnswerIsValid) {
  CemProblem problem = CemScored({5}, 3, NotANumber);
  problem.discrete = true;
  problem.valid_actions = at::tensor({0, 1, 0}).view({1, 3}).to(at::kBool);
  const PlanResult plan = RunCem(ParseCem("horizon: 2 candidates: 8 elites: 2 iterations: 2"), problem);
  EXPECT_TRUE(at::equal(plan.action, at::tensor({0.f, 1.f, 0.f}).view({1, 3})));
  EXPECT_EQ(plan.non_finite_plans, 16);
}

TEST(Cem, MomentumMixesTheOldDistributionIn) {
  const std::string sizes = "horizon: 2 candidates: 20 elites: 5 iterations: 1";
  const auto score = Towards(at::tensor({0.5f, -0.5f}).view({2, 1}));
  const PlanResult full = RunCem(ParseCem(sizes), CemScored({5}, 1, score));
  const PlanResult mixed = RunCem(ParseCem(sizes + " momentum: 0.25"), CemScored({5}, 1, score));
  EXPECT_TRUE(Near(mixed.mean, 0.75 * full.mean, 1e-6)) << "the first mean is 0";
  EXPECT_TRUE(Near(mixed.std, 0.75 * full.std + 0.25, 1e-6)) << "the first deviation is 1";
  const PlanResult floored = RunCem(ParseCem(sizes + " momentum: 0.25 std_floor: 3"), CemScored({5}, 1, score));
  EXPECT_TRUE(at::equal(floored.std, at::full({1, 2, 1}, 3.0f))) << "the floor holds after mixing";
}

TEST(Cem, BeginsFromThePreviousPlanOfThoseThatHaveOne) {
  const auto cem = ParseCem("horizon: 2 candidates: 4 elites: 2 iterations: 1");
  CemProblem problem;
  problem.agents = 2;
  problem.previous_plan = at::tensor({0.5f, -0.25f, 0.75f, 1.0f}).view({2, 2, 1});
  problem.has_previous = at::tensor({0, 1}).to(at::kBool);
  problem.draw = [](int64_t) { return at::zeros({2, 2, 4, 1}); };
  problem.objective = [](const Tensor& plans, int64_t) {
    EXPECT_TRUE(at::equal(plans.select(1, 0), at::zeros({2, 4, 1})));
    EXPECT_TRUE(at::equal(plans.select(1, 1), at::tensor({0.75f, 1.0f}).view({2, 1, 1}).expand({2, 4, 1})));
    return at::zeros({2, 4});
  };
  const PlanResult plan = RunCem(cem, problem);
  EXPECT_TRUE(at::equal(plan.mean[1], problem.previous_plan[1]));
}

TEST(Cem, PreviousProbabilitiesAreMadeToFitTheValidActions) {
  CemProblem problem = CemScored({5}, 4, NotANumber);  // so that the answer is what was begun from
  problem.discrete = true;
  problem.previous_plan = at::tensor({0.f, 1.f, 0.f, 0.f, -1.f, 0.f, 0.f, 0.f}).view({1, 2, 4});
  problem.has_previous = at::ones({1}, at::kBool);
  problem.valid_actions = at::tensor({1, 0, 1, 1}).view({1, 4}).to(at::kBool);
  const PlanResult plan = RunCem(ParseCem("horizon: 2 candidates: 8 elites: 2 iterations: 1"), problem);
  const Tensor third = at::tensor({1.f, 0.f, 1.f, 1.f}).div(3).expand({1, 2, 4});
  EXPECT_TRUE(Near(plan.mean, third, 1e-6)) << "all valid ones were at the floor";
}

TEST(Cem, FreezesEachAgentWhenItsDeviationIsSmall) {
  const auto cem = ParseCem("horizon: 2 candidates: 200 elites: 20 iterations: 30 early_stop_std: 0.1");
  int64_t calls = 0;
  // Agent 0 finds its maximum, agent 1 sees only noise and never does.
  CemProblem problem = CemScored({5, 6}, 1, [&](const Tensor& plans) {
    calls += 1;
    Tensor returns = -(plans - 0.5).square().sum(at::IntArrayRef{0, 3});
    returns[1] = (plans.select(1, 1).select(-1, 0)[0] * 1e4).sin();
    return returns;
  });
  const PlanResult together = RunCem(cem, problem);
  EXPECT_EQ(calls, 30);
  EXPECT_LT(together.std[0].max().item<float>(), 0.1);
  EXPECT_GT(together.std[0].max().item<float>(), 0.01) << "went on after it had found";
  calls = 0;
  const PlanResult alone = RunCem(cem, CemScored({5}, 1, [&](const Tensor& plans) {
    calls += 1;
    return -(plans - 0.5).square().sum(at::IntArrayRef{0, 3});
  }));
  EXPECT_LT(calls, 10) << "stops when all have found";
  EXPECT_TRUE(at::equal(alone.mean[0], together.mean[0]));
  EXPECT_TRUE(at::equal(alone.std[0], together.std[0]));
  EXPECT_TRUE(at::equal(alone.predicted_return[0], together.predicted_return[0]));
}

TEST(Cem, ABatchOfTwoEqualsTwoOfOne) {
  for (const char* options : {"", "momentum: 0.2", "early_stop_std: 0.3"}) {
    const auto cem = ParseCem(std::string("horizon: 3 candidates: 64 elites: 16 iterations: 4 ") + options);
    const auto score = Towards(at::tensor({0.5f, -0.3f, 0.9f, 0.0f, -0.8f, 0.1f}).view({3, 2}));
    const PlanResult both =
        ExpectBatchEqualsSingles([&](const auto& seeds) { return RunCem(cem, CemScored(seeds, 2, score)); });
    EXPECT_FALSE(at::equal(both.mean[0], both.mean[1])) << "the seeds make no difference";
    ExpectBatchEqualsSingles([&](const auto& seeds) {
      CemProblem problem = CemScored(seeds, 3, RightChoices(at::tensor({2, 0, 1})));
      problem.discrete = true;
      return RunCem(cem, problem);
    });
  }
}

}  // namespace
}  // namespace orrery
