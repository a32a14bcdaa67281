// Random shooting: the best of many random plans, for any objective.
#pragma once

#include "libs/config/config.h"
#include "libs/planning/plan_problem.h"

namespace orrery {

// J plans, uniform in [-1, 1] or, discrete, among the valid choices; the answer is the one with the largest return, which
// is its predicted return. A return that is not finite counts as -inf; without a finite one the answer is 0 (discrete:
// uniform probabilities) and its predicted return -inf.
PlanResult RunRandomShooting(const config::v1::RandomShooting& shooting, const PlanProblem& problem);

}  // namespace orrery
