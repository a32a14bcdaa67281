#include "libs/planning/icem.h"

#include <algorithm>
#include <tuple>

#include "libs/planning/testing.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using torch::Tensor;

constexpr double kPi = 3.14159265358979323846;

config::v1::Icem ParseIcem(const std::string& text) { return ParsePlannerOrDie("icem { " + text + " }").icem(); }

// Many sequences [H, J] of coloured noise.
Tensor ManySequences(int64_t h, double beta) {
  AgentNormals normals(std::vector<uint64_t>{3}, torch::kCPU);
  return ColourNoise(normals.Draw({h, 1, 10000, 2}), beta).reshape({h, 20000}).to(at::kDouble);
}

// Mean power of frequencies k / H, k = 1 … H/2 - 1, by the definition of the transform.
std::vector<double> Power(const Tensor& sequences) {
  const int64_t h = sequences.size(0);
  std::vector<double> power;
  for (int64_t k = 1; k < h / 2; ++k) {
    const Tensor angle = at::arange(h, at::kDouble) * (2 * kPi * static_cast<double>(k) / static_cast<double>(h));
    const Tensor real = (sequences * angle.cos().unsqueeze(1)).sum(0), imaginary = (sequences * angle.sin().unsqueeze(1)).sum(0);
    power.push_back((real.square() + imaginary.square()).mean().item<double>());
  }
  return power;
}

// Slope of log(power) over log(k), least squares.
double Slope(const std::vector<double>& power) {
  double n = 0, x = 0, y = 0, xx = 0, xy = 0;
  for (size_t i = 0; i < power.size(); ++i) {
    const double u = std::log(static_cast<double>(i + 1)), v = std::log(power[i]);
    n += 1, x += u, y += v, xx += u * u, xy += u * v;
  }
  return (n * xy - x * y) / (n * xx - x * x);
}

// Mean product of numbers `lag` steps apart.
double Correlation(const Tensor& sequences, int64_t lag) {
  const int64_t h = sequences.size(0);
  return (sequences.narrow(0, 0, h - lag) * sequences.narrow(0, lag, h - lag)).mean().item<double>();
}

TEST(ColourNoise, IsWhiteWithoutAnExponent) {
  const Tensor white = at::randn({8, 2, 3, 2});
  EXPECT_TRUE(at::equal(ColourNoise(white, 0), white));
  const Tensor nearly = ColourNoise(white, 1e-6);
  EXPECT_TRUE(Near(nearly, white, 1e-4)) << "the transform there and back changes nothing";
}

TEST(ColourNoise, HasVarianceOneAtEveryStep) {
  for (const int64_t h : {1, 2, 5, 32}) {
    for (const double beta : {0.5, 2.0, 6.0}) {
      const Tensor variance = ManySequences(h, beta).square().mean(1);
      EXPECT_LT((variance - 1).abs().max().item<double>(), 0.06) << h << " steps, exponent " << beta;
    }
  }
}

TEST(ColourNoise, PowerFallsWithTheExponent) {
  EXPECT_NEAR(Slope(Power(ManySequences(64, 0))), 0, 0.03);
  EXPECT_NEAR(Slope(Power(ManySequences(64, 1))), -1, 0.03);
  EXPECT_NEAR(Slope(Power(ManySequences(64, 2))), -2, 0.03);
}

TEST(ColourNoise, NeighboursAreAlike) {
  const Tensor white = ManySequences(16, 0), brown = ManySequences(16, 2);
  EXPECT_NEAR(Correlation(white, 1), 0, 0.02);
  // The correlation that belongs to the power: Σ power(k) cos(2πk lag / H) / Σ power(k).
  for (const int64_t lag : {1, 2, 4}) {
    double sum = 0, total = 0;
    for (int k = 0; k < 16; ++k) {
      const double power = 1 / std::pow(std::max(std::min(k, 16 - k), 1), 2);
      sum += power * std::cos(2 * kPi * k * static_cast<double>(lag) / 16);
      total += power;
    }
    EXPECT_NEAR(Correlation(brown, lag), sum / total, 0.03) << lag;
  }
  EXPECT_GT(Correlation(brown, 1), 0.7);
}

TEST(ColourNoise, TreatsEachAgentAlone) {
  const Tensor white = at::randn({7, 3, 5, 2});
  const Tensor coloured = ColourNoise(white, 1.5);
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(at::equal(coloured.narrow(1, i, 1), ColourNoise(white.narrow(1, i, 1), 1.5)));
  }
}

TEST(IcemCandidates, ShrinkToTwiceTheElites) {
  const auto icem = ParseIcem("candidates: 40 elites: 10 candidates_decay: 1.25");
  const std::vector<int64_t> expected = {40, 32, 25, 20, 20};
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(IcemCandidates(icem, static_cast<int64_t>(i)), expected[i]);
  EXPECT_EQ(IcemCandidates(ParseIcem("candidates: 10 elites: 10"), 0), 20);
  EXPECT_EQ(IcemCandidates(ParseIcem("candidates_decay: 1"), 200), 40);
}

TEST(Icem, FindsTheMaximumOfAQuadratic) {
  const auto icem = ParseIcem("horizon: 6 iterations: 8 candidates: 200 elites: 20 noise_beta: 1");
  const Tensor target = at::tensor({0.5f, 0.6f, 0.7f, 0.4f, 0.1f, -0.2f}).view({6, 1});
  const PlanResult plan = RunIcem(icem, Scored({5}, 1, Towards(target)));
  EXPECT_LT((plan.mean[0] - target).abs().max().item<float>(), 0.15);
  EXPECT_NEAR(plan.action.item<float>(), 0.5, 0.15);
  EXPECT_GT(plan.predicted_return.item<float>(), -0.05);
}

TEST(Icem, AnswersWithTheBestPlanEverSeen) {
  const auto icem = ParseIcem("horizon: 2 iterations: 4 candidates: 30 elites: 5 kept_elites: 0 noise_beta: 1");
  Tensor best_plan;
  double best = -1;
  int64_t calls = 0;
  PlanProblem problem = Scored({5}, 1, {});
  // Noise: the refits lead nowhere, so that the best may come at any time.
  problem.objective = [&](const Tensor& plans, int64_t i) {
    EXPECT_EQ(i, calls++);
    EXPECT_EQ(plans.size(2), IcemCandidates(icem, i) + (i == 3 ? 1 : 0)) << "the mean competes at last";
    const Tensor returns = (plans.sum(at::IntArrayRef{0, 3}) * 1e4).sin();
    const auto [value, index] = returns.max(1);
    if (value.item<double>() > best) {
      best = value.item<double>();
      best_plan = plans.select(2, index.item<int64_t>()).clone();  // [H, N, A]
    }
    return returns;
  };
  const PlanResult plan = RunIcem(icem, problem);
  EXPECT_EQ(calls, 4);
  EXPECT_TRUE(at::equal(plan.action, best_plan[0]));
  EXPECT_EQ(plan.predicted_return.item<double>(), best);
}

TEST(Icem, TheMeanIsACandidateOfTheLastIteration) {
  const auto icem = ParseIcem("horizon: 2 iterations: 1 candidates: 10 elites: 2 noise_beta: 0");
  PlanProblem problem = Scored({5}, 1, Towards(at::tensor({0.5f, -0.25f}).view({2, 1})));
  problem.previous_plan = at::tensor({0.5f, -0.25f}).view({1, 2, 1});
  problem.has_previous = at::ones({1}, at::kBool);
  const PlanResult plan = RunIcem(icem, problem);
  EXPECT_EQ(plan.action.item<float>(), 0.5);
  EXPECT_EQ(plan.predicted_return.item<float>(), 0);
}

TEST(Icem, KeepsElitesWithTheReturnsTheyHad) {
  const auto icem = ParseIcem("horizon: 1 iterations: 2 candidates: 8 elites: 4 kept_elites: 0.5 momentum: 0");
  PlanProblem problem = Scored({5}, 1, {});
  Tensor first, second;
  // What is drawn later is worse than the two elites that are kept.
  problem.objective = [&](const Tensor& plans, int64_t i) {
    (i == 0 ? first : second) = plans.reshape({-1}).clone();
    const Tensor sum = plans.sum(at::IntArrayRef{0, 3});
    return i == 0 ? sum : -100 - sum;
  };
  const PlanResult plan = RunIcem(icem, problem);
  const Tensor kept = std::get<0>(first.topk(2)), drawn = std::get<0>(second.topk(2, 0, /*largest=*/false));
  EXPECT_NEAR(plan.mean.item<double>(), at::cat({kept, drawn}).mean().item<double>(), 1e-5);
  EXPECT_EQ(plan.action.item<float>(), kept[0].item<float>());
}

TEST(Icem, ReturnsThatAreNotFiniteNeverWin) {
  const auto icem = ParseIcem("horizon: 1 iterations: 6 candidates: 200 elites: 20 noise_beta: 0");
  const PlanResult plan = RunIcem(icem, Scored({5}, 1, SumBelowZero));
  EXPECT_LE(plan.action.item<float>(), 0);
  EXPECT_GT(plan.action.item<float>(), -0.1);
  EXPECT_GT(plan.non_finite_plans, 50);
}

TEST(Icem, WithoutAFinitePlanTheMeanIsTheAnswer) {
  PlanProblem problem = Scored({5}, 1, NotANumber);
  problem.previous_plan = at::tensor({0.25f, 0.5f}).view({1, 2, 1});
  problem.has_previous = at::ones({1}, at::kBool);
  const PlanResult plan = RunIcem(ParseIcem("horizon: 2 iterations: 2 candidates: 8 elites: 2"), problem);
  EXPECT_EQ(plan.action.item<float>(), 0.25);
  EXPECT_TRUE(at::equal(plan.mean, problem.previous_plan));
  EXPECT_TRUE(at::equal(plan.std, at::full({1, 2, 1}, 0.5f)));
  EXPECT_EQ(plan.predicted_return.item<float>(), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(plan.non_finite_plans, 8 + 6 + 1);
}

TEST(Icem, ABatchOfTwoEqualsTwoOfOne) {
  const auto icem = ParseIcem("horizon: 5 iterations: 4 candidates: 64 elites: 16 noise_beta: 2");
  const auto score = Towards(at::rand({5, 2}) - 0.5);
  const PlanResult both =
      ExpectBatchEqualsSingles([&](const auto& seeds) { return RunIcem(icem, Scored(seeds, 2, score)); });
  EXPECT_FALSE(at::equal(both.mean[0], both.mean[1])) << "the seeds make no difference";
}

}  // namespace
}  // namespace orrery
