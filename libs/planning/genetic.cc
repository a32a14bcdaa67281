#include "libs/planning/genetic.h"

#include <limits>

#include "libs/planning/plan_parts.h"

namespace orrery {
namespace {

using torch::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Numbers of an action that are inherited together.
int64_t GeneSize(const PlanProblem& problem) { return problem.discrete ? problem.action_size : 1; }

// Mean returns [N, P] of a population [H, N, P, A].
Tensor Simulate(const config::v1::Genetic& genetic, const PlanProblem& problem, const Tensor& plans, int64_t generation) {
  const int64_t h = plans.size(0), n = plans.size(1), p = plans.size(2), a = plans.size(3), m = genetic.simulations();
  const Tensor repeated = plans.unsqueeze(3).expand({h, n, p, m, a}).reshape({h, n, p * m, a});
  return problem.objective(repeated, generation).reshape({n, p, m}).mean(2);
}

// Index [N, 1] of a plan with the largest return [N, P], any of them by `normals` [N, P].
Tensor IndexOfBest(const Tensor& returns, const Tensor& normals) {
  const Tensor worse = returns < returns.amax({1}, /*keepdim=*/true);
  return normals.masked_fill(worse, -kInfinity).argmax(1, /*keepdim=*/true);
}

Tensor Mutate(const config::v1::Genetic& genetic, const PlanProblem& problem, const Tensor& children) {
  const int64_t h = children.size(0), n = children.size(1), c = children.size(2), a = children.size(3);
  const Tensor chance = ToUniform(problem.normals({h, n, c, a / GeneSize(problem)}));
  const Tensor mutated =
      problem.discrete ? UniformPlans(problem, h, c)
                       : (children + problem.normals({h, n, c, a}) * genetic.mutation_std()).clamp_(-1, 1);
  return at::where(chance < genetic.mutation_probability(), mutated, children);
}

// `count` children [H, N, count, A] of a population and its returns.
Tensor Breed(const config::v1::Genetic& genetic, const PlanProblem& problem, const Tensor& plans, const Tensor& returns,
             int64_t count) {
  const int64_t h = plans.size(0), n = plans.size(1), p = plans.size(2), a = plans.size(3), pairs = (count + 1) / 2;
  const Tensor index = SampleIndex(RouletteWeights(returns), problem.normals({2 * pairs, n, p}));  // [2 · pairs, N]
  const Tensor parents = PickPlans(plans, index.transpose(0, 1));
  const Tensor coin = problem.normals({h, n, pairs, a / GeneSize(problem)}) > 0;
  const auto [one, other] = Crossover(parents.narrow(2, 0, pairs), parents.narrow(2, pairs, pairs), coin);
  return Mutate(genetic, problem, at::cat({one, other}, 2)).narrow(2, 0, count);
}

}  // namespace

Tensor RouletteWeights(const Tensor& returns) {
  const Tensor finite = returns.isfinite();
  const Tensor wide = returns.to(at::kDouble);  // in which no difference of two floats overflows
  const Tensor least = wide.masked_fill(finite.logical_not(), kInfinity).amin({1}, /*keepdim=*/true);
  const Tensor above = (wide - least).masked_fill(finite.logical_not(), 0);
  const Tensor sum = above.sum(1, /*keepdim=*/true);
  const Tensor equal = finite.logical_or(finite.any(1, /*keepdim=*/true).logical_not()).to(at::kDouble);
  return at::where(sum > 0, above / sum, equal / equal.sum(1, /*keepdim=*/true)).to(returns.scalar_type());
}

std::pair<Tensor, Tensor> Crossover(const Tensor& first, const Tensor& second, const Tensor& coin) {
  return {at::where(coin, first, second), at::where(coin, second, first)};
}

PlanResult RunGenetic(const config::v1::Genetic& genetic, const PlanProblem& problem) {
  const int64_t n = problem.agents, p = genetic.population();
  const PlanDistribution start = StartDistribution(problem, genetic.horizon(), /*deviation=*/0);
  BestPlan best = NoPlanYet(start);
  Tensor non_finite = NoneNonFinite(problem);
  Tensor plans = UniformPlans(problem, genetic.horizon(), p);
  for (int64_t g = 0; g < genetic.generations(); ++g) {
    const Tensor returns = MaskNonFinite(Simulate(genetic, problem, plans, g), non_finite);
    const Tensor index = IndexOfBest(returns, problem.normals({1, n, p}).squeeze(0));
    const Tensor elite = PickPlans(plans, index);
    const Tensor value = returns.gather(1, index).squeeze(1);
    const Tensor finite = value.isfinite();
    best.plan = at::where(finite.view({1, n, 1, 1}), elite, best.plan);
    best.returns = at::where(finite, value, best.returns);
    if (g + 1 == genetic.generations()) break;
    plans = at::cat({elite, Breed(genetic, problem, plans, returns, p - 1)}, 2);
  }
  PlanResult result = MakeResult(problem, best.plan, start.std, non_finite);
  result.predicted_return = best.returns;
  return result;
}

}  // namespace orrery
