#include "libs/planning/cem.h"

#include <limits>

#include "libs/planning/plan_parts.h"

namespace orrery {
namespace {

using torch::Tensor;

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

Tensor Draw(const config::v1::Cem& cem, const CemProblem& problem, int64_t i) {
  if (problem.draw) return problem.draw(i);
  return problem.normals({cem.horizon(), problem.agents, cem.candidates(), problem.action_size});
}

}  // namespace

PlanResult RunCem(const config::v1::Cem& cem, const CemProblem& problem) {
  const bool stops_early = cem.early_stop_std() > 0;
  PlanDistribution plan = StartDistribution(problem, cem.horizon(), /*deviation=*/1);
  Tensor stuck = at::zeros({problem.agents}, problem.options.dtype(at::kBool));  // without a finite plan
  Tensor found = at::zeros_like(stuck);                                          // σ is small enough
  Tensor non_finite = NoneNonFinite(problem);
  Tensor predicted = at::zeros({problem.agents}, problem.options);
  for (int64_t i = 0; i < cem.iterations(); ++i) {
    const Tensor plans = SamplePlans(problem, plan, Draw(cem, problem, i));
    Tensor returns = problem.objective(plans, i);
    // What is computed for an agent that is done, because others are not, shall not count.
    if (stops_early) returns = returns.masked_fill(stuck.logical_or(found).unsqueeze(1), 0);
    const Elites elites = TakeElites(plans, MaskNonFinite(returns, non_finite), cem.elites());
    stuck.logical_or_(elites.finite.sum(1) == 0);
    Refit(problem, elites, cem.momentum(), cem.std_floor(), stuck.logical_or(found), plan);
    predicted = predicted.where(found, MeanReturn(elites).masked_fill(stuck, kMinusInfinity));
    if (!stops_early) continue;
    found.logical_or_(plan.std.amax({0, 2, 3}) < cem.early_stop_std());
    if (stuck.logical_or(found).all().item<bool>()) break;
  }
  PlanResult result = MakeResult(problem, plan.mean, plan.std, non_finite);
  result.predicted_return = predicted;
  return result;
}

}  // namespace orrery
