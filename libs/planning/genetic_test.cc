#include "libs/planning/genetic.h"

#include "libs/planning/testing.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using torch::Tensor;

const float kInfinity = std::numeric_limits<float>::infinity();

config::v1::Genetic ParseGenetic(const std::string& text) {
  return ParsePlannerOrDie("genetic { " + text + " }").genetic();
}

TEST(RouletteWeights, GrowWithTheReturnAboveTheWorst) {
  const Tensor returns = at::tensor({1.f, 3.f, 2.f, -5.f, -5.f, -5.f}).view({2, 3});
  const Tensor weights = RouletteWeights(returns);
  EXPECT_TRUE(Near(weights[0], at::tensor({0.f, 2.f / 3, 1.f / 3}), 1e-6));
  EXPECT_TRUE(Near(weights[1], at::full({3}, 1.0 / 3), 1e-6)) << "all are equal";
}

TEST(RouletteWeights, GiveNothingToWhatIsNotFinite) {
  const Tensor returns = at::tensor({-kInfinity, 1.f, 3.f, -kInfinity, 7.f, 7.f, -kInfinity, -kInfinity, -kInfinity, -3e38f, 3e38f, 0.f});
  const Tensor weights = RouletteWeights(returns.view({4, 3}));
  EXPECT_TRUE(Near(weights[0], at::tensor({0.f, 0.f, 1.f}), 1e-6));
  EXPECT_TRUE(Near(weights[1], at::tensor({0.f, 0.5f, 0.5f}), 1e-6));
  EXPECT_TRUE(Near(weights[2], at::full({3}, 1.0 / 3), 1e-6));
  EXPECT_TRUE(Near(weights[3], at::tensor({0.f, 2.f / 3, 1.f / 3}), 1e-6)) << "differences do not overflow";
}

TEST(RouletteWeights, AreTheFrequenciesOfParents) {
  AgentNormals normals(std::vector<uint64_t>{3}, torch::kCPU);
  const Tensor weights = RouletteWeights(at::tensor({1.f, 3.f, 2.f}).view({1, 3}));
  const Tensor index = SampleIndex(weights, normals.Draw({30000, 1, 3})).squeeze(1);
  EXPECT_EQ((index == 0).sum().item<int64_t>(), 0);
  EXPECT_NEAR((index == 1).to(at::kDouble).mean().item<double>(), 2.0 / 3, 0.015);
}

TEST(Crossover, ChildrenAreComplementary) {
  const Tensor first = at::arange(24, at::kFloat).view({3, 1, 4, 2}), second = -first - 1;
  const Tensor coin = at::randn({3, 1, 4, 2}) > 0;
  const auto [one, other] = Crossover(first, second, coin);
  EXPECT_TRUE(at::equal(one + other, first + second)) << "each gene of both parents is there once";
  EXPECT_TRUE(at::equal(one == first, coin));
  EXPECT_TRUE(at::equal(other == second, coin));
  // One coin for all numbers of an action.
  const auto [whole, rest] = Crossover(first, second, at::ones({3, 1, 4, 1}, at::kBool));
  EXPECT_TRUE(at::equal(whole, first));
  EXPECT_TRUE(at::equal(rest, second));
}

TEST(Genetic, ChildrenAreMadeOfTheirParentsGenes) {
  const auto genetic = ParseGenetic("horizon: 4 generations: 2 population: 6 simulations: 1 mutation_probability: 0");
  PlanProblem problem = Scored({5}, 1, {});
  std::vector<Tensor> seen;
  problem.objective = [&](const Tensor& plans, int64_t i) {
    EXPECT_EQ(i, static_cast<int64_t>(seen.size()));
    seen.push_back(plans.squeeze(1).squeeze(-1).clone());  // [H, P]
    return plans.sum(at::IntArrayRef{0, 3});
  };
  RunGenetic(genetic, problem);
  ASSERT_EQ(seen.size(), 2u);
  ASSERT_EQ(seen[1].size(1), 6) << "the population keeps its size";
  const Tensor best = seen[0].select(1, seen[0].sum(0).argmax().item<int64_t>());
  EXPECT_TRUE(at::equal(seen[1].select(1, 0), best)) << "the best goes on unchanged";
  for (int64_t t = 0; t < 4; ++t) {
    const Tensor inherited = (seen[1][t].unsqueeze(1) == seen[0][t].unsqueeze(0)).any(1);
    EXPECT_TRUE(inherited.all().item<bool>()) << "step " << t;
  }
  // Of the children 1 to 5 the 4th and the 5th are the others of the 1st and the 2nd: a pair has, step by step, the genes of
  // one pair of parents.
  for (const int64_t child : {1, 2}) {
    const Tensor one = seen[0] == seen[1].select(1, child).unsqueeze(1);  // [H, P]
    const Tensor other = seen[0] == seen[1].select(1, child + 3).unsqueeze(1);
    const Tensor match = (one.unsqueeze(2) & other.unsqueeze(1)) | (other.unsqueeze(2) & one.unsqueeze(1));
    EXPECT_TRUE(match.all(0).any().item<bool>()) << "child " << child;
  }
}

TEST(Genetic, MutatesGenesWithTheirProbability) {
  // Everybody is equal, so that only mutation changes anything.
  const auto equal = [](const Tensor& plans) { return at::zeros({plans.size(1), plans.size(2)}); };
  const auto changed = [&](const std::string& options, bool discrete) {
    const auto genetic = ParseGenetic("horizon: 64 generations: 2 population: 401 simulations: 1 " + options);
    PlanProblem problem = Scored({5}, 2, equal);
    problem.discrete = discrete;
    std::vector<Tensor> seen;
    problem.objective = [&](const Tensor& plans, int64_t) {
      seen.push_back(plans.squeeze(1).clone());  // [H, P, A]
      return equal(plans);
    };
    RunGenetic(genetic, problem);
    const Tensor children = seen[1].narrow(1, 1, 400);
    EXPECT_LE(children.abs().max().item<float>(), 1);
    if (discrete) return children;
    // Whether each number is one of the parents' at that step.
    return (children.unsqueeze(2) != seen[0].unsqueeze(1)).all(2).to(at::kDouble);
  };
  EXPECT_NEAR(changed("mutation_probability: 0.1", false).mean().item<double>(), 0.1, 0.01);
  EXPECT_GT(changed("mutation_probability: 1", false).mean().item<double>(), 0.999);
  EXPECT_EQ(changed("mutation_probability: 0", false).sum().item<double>(), 0);
  const Tensor choices = changed("mutation_probability: 0.5", true);
  EXPECT_TRUE(at::equal(choices.sum(-1), at::ones({64, 400}))) << "still one-hot";
}

TEST(Genetic, ScoresEachPlanByTheMeanOfItsSimulations) {
  const auto genetic = ParseGenetic("horizon: 2 generations: 1 population: 3 simulations: 4");
  PlanProblem problem = Scored({5}, 1, {});
  Tensor plans_seen;
  problem.objective = [&](const Tensor& plans, int64_t) {
    plans_seen = plans.clone();
    // Plan 0: 0, 1, 2, 3; plan 1: 4, 5, 6, 7; plan 2: 8, 9, 10 and not a number.
    Tensor returns = at::arange(12, at::kFloat).view({1, 12});
    returns[0][11] = std::nanf("");
    return returns;
  };
  const PlanResult plan = RunGenetic(genetic, problem);
  ASSERT_EQ(plans_seen.size(2), 12);
  for (int64_t s = 1; s < 4; ++s) EXPECT_TRUE(at::equal(plans_seen.select(2, 4 + s), plans_seen.select(2, 4)));
  EXPECT_EQ(plan.predicted_return.item<float>(), 5.5);
  EXPECT_TRUE(at::equal(plan.mean[0], plans_seen.select(2, 4).squeeze(1)));
  EXPECT_EQ(plan.non_finite_plans, 1);
}

TEST(Genetic, FindsContinuousPlans) {
  const auto genetic = ParseGenetic("horizon: 2 generations: 60 population: 40 simulations: 1");
  const Tensor target = at::tensor({0.5f, -0.3f}).view({2, 1});
  const PlanResult plan = RunGenetic(genetic, Scored({5}, 1, Towards(target)));
  EXPECT_LT((plan.mean[0] - target).abs().max().item<float>(), 0.15);
  EXPECT_TRUE(at::equal(plan.action, plan.mean.select(1, 0)));
  EXPECT_TRUE(at::equal(plan.std, at::zeros({1, 2, 1})));
}

TEST(Genetic, FindsDiscretePlans) {
  const auto genetic = ParseGenetic("horizon: 3 generations: 30 population: 30 simulations: 1");
  PlanProblem problem = Scored({5}, 4, RightChoices(at::tensor({2, 0, 3})));
  problem.discrete = true;
  const PlanResult plan = RunGenetic(genetic, problem);
  EXPECT_EQ(plan.predicted_return.item<float>(), 3);
  EXPECT_TRUE(at::equal(plan.action, at::tensor({0.f, 0.f, 1.f, 0.f}).view({1, 4})));
}

TEST(Genetic, NeverPlansAnActionThatIsNotValid) {
  const auto genetic = ParseGenetic("horizon: 3 generations: 20 population: 20 simulations: 2 mutation_probability: 0.5");
  PlanProblem problem = Scored({5, 6}, 4, [](const Tensor& plans) {
    EXPECT_EQ(plans.select(1, 0).select(-1, 2).sum().item<float>(), 0);
    return plans.select(-1, 2).sum(0) + 0.5 * plans.select(-1, 1).sum(0);
  });
  problem.discrete = true;
  problem.valid_actions = at::tensor({1, 1, 0, 1, 1, 1, 1, 1}).view({2, 4}).to(at::kBool);
  const PlanResult plan = RunGenetic(genetic, problem);
  EXPECT_TRUE(at::equal(plan.action[0], at::tensor({0.f, 1.f, 0.f, 0.f})));
  EXPECT_TRUE(at::equal(plan.action[1], at::tensor({0.f, 0.f, 1.f, 0.f})));
}

TEST(Genetic, ReturnsThatAreNotFiniteNeverWin) {
  const auto genetic = ParseGenetic("horizon: 1 generations: 30 population: 40 simulations: 1");
  const PlanResult plan = RunGenetic(genetic, Scored({5}, 1, SumBelowZero));
  EXPECT_LE(plan.action.item<float>(), 0);
  EXPECT_GT(plan.action.item<float>(), -0.1);
  EXPECT_GT(plan.non_finite_plans, 20);
}

TEST(Genetic, WithoutAFinitePlanTheAnswerStaysWhatItWas) {
  const auto genetic = ParseGenetic("horizon: 2 generations: 3 population: 4 simulations: 2");
  PlanProblem problem = Scored({5}, 1, NotANumber);
  const PlanResult none = RunGenetic(genetic, problem);
  EXPECT_TRUE(at::equal(none.mean, at::zeros({1, 2, 1})));
  EXPECT_EQ(none.predicted_return.item<float>(), -kInfinity);
  EXPECT_EQ(none.non_finite_plans, 12);
  problem.objective = [](const Tensor& plans, int64_t i) {
    return i == 0 ? plans.sum(at::IntArrayRef{0, 3}) : NotANumber(plans);
  };
  const PlanResult once = RunGenetic(genetic, problem);
  EXPECT_NEAR(once.predicted_return.item<float>(), once.mean.sum().item<float>(), 1e-5);
  EXPECT_EQ(once.non_finite_plans, 8);
}

TEST(Genetic, ABatchOfTwoEqualsTwoOfOne) {
  const auto genetic = ParseGenetic("horizon: 3 generations: 4 population: 8 simulations: 3");
  const auto score = Towards(at::rand({3, 2}) - 0.5);
  const PlanResult both =
      ExpectBatchEqualsSingles([&](const auto& seeds) { return RunGenetic(genetic, Scored(seeds, 2, score)); });
  EXPECT_FALSE(at::equal(both.mean[0], both.mean[1])) << "the seeds make no difference";
  ExpectBatchEqualsSingles([&](const auto& seeds) {
    PlanProblem problem = Scored(seeds, 3, RightChoices(at::tensor({2, 0, 1})));
    problem.discrete = true;
    return RunGenetic(genetic, problem);
  });
}

}  // namespace
}  // namespace orrery
