#include "libs/planning/random_shooting.h"

#include "libs/planning/testing.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using torch::Tensor;

config::v1::RandomShooting ParseShooting(const std::string& text) {
  return ParsePlannerOrDie("random_shooting { " + text + " }").random_shooting();
}

TEST(UniformPlans, AreUniform) {
  PlanProblem problem = Scored({5}, 2, {});
  const Tensor plans = UniformPlans(problem, /*horizon=*/3, /*count=*/5000);
  EXPECT_EQ(plans.sizes(), at::IntArrayRef({3, 1, 5000, 2}));
  EXPECT_LE(plans.abs().max().item<float>(), 1);
  EXPECT_NEAR(plans.mean().item<double>(), 0, 0.02);
  EXPECT_NEAR(plans.square().mean().item<double>(), 1.0 / 3, 0.02);
  for (int tenth = 1; tenth < 10; ++tenth) {
    EXPECT_NEAR((plans < tenth * 0.2 - 1).to(at::kDouble).mean().item<double>(), tenth * 0.1, 0.02);
  }
}

TEST(UniformPlans, AreUniformAmongTheValidChoices) {
  PlanProblem problem = Scored({5, 6}, 4, {});
  problem.discrete = true;
  problem.valid_actions = at::tensor({1, 0, 1, 1, 0, 0, 1, 0}).view({2, 4}).to(at::kBool);
  const Tensor plans = UniformPlans(problem, /*horizon=*/2, /*count=*/5000);
  EXPECT_TRUE(at::equal(plans.sum(-1), at::ones({2, 2, 5000})));
  const Tensor share = plans.mean(at::IntArrayRef{0, 2});
  EXPECT_LT((share[0] - at::tensor({1.f, 0.f, 1.f, 1.f}) / 3).abs().max().item<float>(), 0.02);
  EXPECT_TRUE(at::equal(share[0][1], at::zeros({})));
  EXPECT_TRUE(at::equal(plans.select(1, 1).select(-1, 2), at::ones({2, 5000})));
}

TEST(RandomShooting, TakesTheBestPlan) {
  PlanProblem problem = Scored({5}, 2, {});
  Tensor best;
  problem.objective = [&](const Tensor& plans, int64_t) {
    const Tensor returns = plans.sum(at::IntArrayRef{0, 3});
    best = plans.select(2, returns.argmax().item<int64_t>()).squeeze(1).clone();  // [H, A]
    return returns;
  };
  const PlanResult plan = RunRandomShooting(ParseShooting("horizon: 3 candidates: 50"), problem);
  EXPECT_TRUE(at::equal(plan.mean[0], best));
  EXPECT_TRUE(at::equal(plan.action[0], best[0]));
  EXPECT_TRUE(at::equal(plan.std, at::zeros({1, 3, 2})));
  EXPECT_NEAR(plan.predicted_return.item<double>(), best.sum().item<double>(), 1e-5);
}

TEST(RandomShooting, ChoosesAmongTheValidActions) {
  // Choice 2 would be right, 3 is second.
  PlanProblem problem = Scored({5}, 4, [](const Tensor& plans) {
    EXPECT_EQ(plans.select(-1, 2).sum().item<float>(), 0);
    return plans.select(-1, 2).sum(0) * 2 + plans.select(-1, 3).sum(0);
  });
  problem.discrete = true;
  problem.valid_actions = at::tensor({1, 1, 0, 1}).view({1, 4}).to(at::kBool);
  const PlanResult plan = RunRandomShooting(ParseShooting("horizon: 2 candidates: 200"), problem);
  EXPECT_TRUE(at::equal(plan.action, at::tensor({0.f, 0.f, 0.f, 1.f}).view({1, 4})));
  EXPECT_EQ(plan.predicted_return.item<float>(), 2);
}

TEST(RandomShooting, ReturnsThatAreNotFiniteNeverWin) {
  const PlanResult plan = RunRandomShooting(ParseShooting("horizon: 1 candidates: 500"), Scored({5}, 1, SumBelowZero));
  EXPECT_LE(plan.action.item<float>(), 0);
  EXPECT_GT(plan.action.item<float>(), -0.1);
  EXPECT_GT(plan.non_finite_plans, 100);
  const PlanResult none = RunRandomShooting(ParseShooting("horizon: 2 candidates: 5"), Scored({5}, 1, NotANumber));
  EXPECT_TRUE(at::equal(none.mean, at::zeros({1, 2, 1})));
  EXPECT_EQ(none.predicted_return.item<float>(), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(none.non_finite_plans, 5);
}

TEST(RandomShooting, ABatchOfTwoEqualsTwoOfOne) {
  const auto shooting = ParseShooting("horizon: 3 candidates: 64");
  const auto score = Towards(at::rand({3, 2}) - 0.5);
  const PlanResult both =
      ExpectBatchEqualsSingles([&](const auto& seeds) { return RunRandomShooting(shooting, Scored(seeds, 2, score)); });
  EXPECT_FALSE(at::equal(both.mean[0], both.mean[1])) << "the seeds make no difference";
}

}  // namespace
}  // namespace orrery
