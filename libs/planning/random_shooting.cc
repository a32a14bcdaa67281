#include "libs/planning/random_shooting.h"

#include "libs/planning/plan_parts.h"

namespace orrery {

using torch::Tensor;

PlanResult RunRandomShooting(const config::v1::RandomShooting& shooting, const PlanProblem& problem) {
  const PlanDistribution start = StartDistribution(problem, shooting.horizon(), /*deviation=*/0);
  Tensor non_finite = NoneNonFinite(problem);
  const Tensor plans = UniformPlans(problem, shooting.horizon(), shooting.candidates());
  BestPlan best = NoPlanYet(start);
  KeepBetter(plans, MaskNonFinite(problem.objective(plans, 0), non_finite), best);
  PlanResult result = MakeResult(problem, best.plan, start.std, non_finite);
  result.predicted_return = best.returns;
  return result;
}

}  // namespace orrery
