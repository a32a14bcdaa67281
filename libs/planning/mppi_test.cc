#include "libs/planning/mppi.h"

#include "libs/planning/testing.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using torch::Tensor;

const float kInfinity = std::numeric_limits<float>::infinity();

config::v1::Mppi ParseMppi(const std::string& text) { return ParsePlannerOrDie("mppi { " + text + " }").mppi(); }

TEST(MppiWeights, AreASoftmaxOfTheReturns) {
  // exp(0), exp(-0.5), exp(-1) over their sum, 1.974410.
  EXPECT_TRUE(Near(MppiWeights(at::tensor({3.f, 2.f, 1.f}).view({1, 3}), 0.5),
                   at::tensor({0.506480f, 0.307196f, 0.186324f}).view({1, 3}), 1e-5));
  // exp(0), exp(-4): the higher the temperature, the more the best decides.
  EXPECT_TRUE(Near(MppiWeights(at::tensor({3.f, 1.f}).view({1, 2}), 2),
                   at::tensor({0.982014f, 0.017986f}).view({1, 2}), 1e-5));
}

TEST(MppiWeights, NeitherOverflowNorCountWhatIsNotFinite) {
  const Tensor returns = at::tensor({3e38f, -3e38f, -kInfinity, 1000.f, 999.f, -kInfinity, -kInfinity, -kInfinity, -kInfinity});
  const Tensor weights = MppiWeights(returns.view({3, 3}), 1);
  EXPECT_TRUE(Near(weights[0], at::tensor({1.f, 0.f, 0.f}), 1e-6));
  EXPECT_TRUE(Near(weights[1], at::tensor({0.731059f, 0.268941f, 0.f}), 1e-5));
  EXPECT_TRUE(Near(weights[2], at::full({3}, 1.0 / 3), 1e-6));
}

TEST(Mppi, FindsTheMaximumOfAQuadratic) {
  const Tensor target = at::tensor({0.5f, -0.3f, 0.9f, 0.0f, -0.8f, 0.1f}).view({3, 2});
  const PlanResult plan = RunMppi(ParseMppi(""), Scored({5}, 2, Towards(target)));
  EXPECT_LT((plan.mean[0] - target).abs().max().item<float>(), 0.25);
  EXPECT_TRUE(at::equal(plan.action, plan.mean.select(1, 0)));
  EXPECT_GT(plan.predicted_return.item<float>(), -0.1);
}

TEST(Mppi, RefitsWithTheWeightsOfTheElites) {
  const auto mppi = ParseMppi("horizon: 1 iterations: 1 candidates: 8 elites: 2 temperature: 0.5 min_std: 0 max_std: 1");
  PlanProblem problem = Scored({5}, 1, {});
  Tensor seen;
  problem.objective = [&](const Tensor& plans, int64_t) {
    seen = plans.view(-1).clone();
    Tensor returns = at::full({1, 8}, -10.0);
    returns[0][2] = 1;
    returns[0][5] = 2;
    return returns;
  };
  const PlanResult plan = RunMppi(mppi, problem);
  // exp(-0.5) / (1 + exp(-0.5)) and the rest.
  const double weak = 0.377541, strong = 0.622459, a = seen[2].item<double>(), b = seen[5].item<double>();
  const double mean = weak * a + strong * b;
  EXPECT_NEAR(plan.mean.item<double>(), mean, 1e-5);
  EXPECT_NEAR(plan.std.item<double>(), std::sqrt(weak * (a - mean) * (a - mean) + strong * (b - mean) * (b - mean)), 1e-5);
  EXPECT_NEAR(plan.predicted_return.item<double>(), weak * 1 + strong * 2, 1e-5);
}

TEST(Mppi, KeepsTheDeviationInItsBounds) {
  const auto narrow = ParseMppi("horizon: 2 iterations: 10 min_std: 0.25 max_std: 0.5");
  const auto towards = Towards(at::tensor({0.5f, 0.5f}).view({2, 1}));
  EXPECT_TRUE(at::equal(RunMppi(narrow, Scored({5}, 1, towards)).std, at::full({1, 2, 1}, 0.25f)));
  const PlanResult begun = RunMppi(ParseMppi("horizon: 2 iterations: 1 max_std: 0.5"), Scored({5}, 1, NotANumber));
  EXPECT_TRUE(at::equal(begun.std, at::full({1, 2, 1}, 0.5f))) << "begins with the largest";
}

TEST(Mppi, ReturnsThatAreNotFiniteNeverWin) {
  const PlanResult plan = RunMppi(ParseMppi("horizon: 1 candidates: 200 elites: 20 temperature: 20"), Scored({5}, 1, SumBelowZero));
  EXPECT_LE(plan.action.item<float>(), 0);
  EXPECT_GT(plan.action.item<float>(), -0.15);
  EXPECT_GT(plan.non_finite_plans, 50);
}

TEST(Mppi, WithoutAFinitePlanTheMeanStays) {
  PlanProblem problem = Scored({5, 6}, 1, NotANumber);
  problem.previous_plan = at::tensor({0.25f, 0.5f, 0.75f, 1.0f}).view({2, 2, 1});
  problem.has_previous = at::tensor({1, 0}).to(at::kBool);
  const PlanResult plan = RunMppi(ParseMppi("horizon: 2 iterations: 2 candidates: 8 elites: 2"), problem);
  EXPECT_TRUE(at::equal(plan.mean[0], problem.previous_plan[0]));
  EXPECT_TRUE(at::equal(plan.mean[1], at::zeros({2, 1})));
  EXPECT_TRUE(at::equal(plan.predicted_return, at::full({2}, -kInfinity)));
  EXPECT_EQ(plan.non_finite_plans, 32);
}

TEST(Mppi, ABatchOfTwoEqualsTwoOfOne) {
  const auto mppi = ParseMppi("horizon: 3 iterations: 4 candidates: 64 elites: 16");
  const auto score = Towards(at::rand({3, 2}) - 0.5);
  const PlanResult both =
      ExpectBatchEqualsSingles([&](const auto& seeds) { return RunMppi(mppi, Scored(seeds, 2, score)); });
  EXPECT_FALSE(at::equal(both.mean[0], both.mean[1])) << "the seeds make no difference";
}

}  // namespace
}  // namespace orrery
