#include "libs/planning/mppi.h"

#include <limits>

#include "libs/planning/plan_parts.h"

namespace orrery {
namespace {

using torch::Tensor;

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

}  // namespace

Tensor MppiWeights(const Tensor& returns, double temperature) {
  const Tensor finite = returns.isfinite();
  const Tensor best = returns.masked_fill(finite.logical_not(), kMinusInfinity).amax({1}, /*keepdim=*/true);
  const Tensor exponent = ((returns - best) * temperature).masked_fill(finite.logical_not(), kMinusInfinity);
  const Tensor none = finite.any(1, /*keepdim=*/true).logical_not();
  return exponent.masked_fill(none, 0).softmax(1);
}

PlanResult RunMppi(const config::v1::Mppi& mppi, const PlanProblem& problem) {
  const int64_t n = problem.agents;
  PlanDistribution plan = StartDistribution(problem, mppi.horizon(), mppi.max_std());
  Tensor non_finite = NoneNonFinite(problem);
  Tensor predicted;
  for (int64_t i = 0; i < mppi.iterations(); ++i) {
    const Tensor normals = problem.normals({mppi.horizon(), n, mppi.candidates(), problem.action_size});
    const Tensor plans = SamplePlans(problem, plan, normals);
    const Elites elites = TakeElites(plans, MaskNonFinite(problem.objective(plans, i), non_finite), mppi.elites());
    const Tensor weights = MppiWeights(elites.returns, mppi.temperature());
    const PlanFit fit = FitPlans(elites.plans, weights);
    const Tensor none = elites.finite.sum(1) == 0;
    const Tensor keep = none.view({1, n, 1, 1});
    plan.mean = plan.mean.where(keep, fit.mean);
    plan.std = plan.std.where(keep, fit.variance.sqrt().clamp_(mppi.min_std(), mppi.max_std()));
    predicted = (weights * elites.returns.masked_fill(elites.finite == 0, 0)).sum(1).masked_fill(none, kMinusInfinity);
  }
  PlanResult result = MakeResult(problem, plan.mean, plan.std, non_finite);
  result.predicted_return = predicted;
  return result;
}

}  // namespace orrery
