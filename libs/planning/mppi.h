// Model predictive path integral control as TD-MPC2 uses it (Hansen et al. 2024), for any objective.
#pragma once

#include <torch/torch.h>

#include "libs/config/config.h"
#include "libs/planning/plan_problem.h"

namespace orrery {

// exp(temperature · (R - max R)) of returns R [N, K], each agent's adding up to 1. A return that is not finite weighs
// nothing; where none is finite all weigh the same.
torch::Tensor MppiWeights(const torch::Tensor& returns, double temperature);

// μ = 0 or the previous plan, σ = max_std, then I times: J plans clip(μ + σ·noise, -1, 1), the K best by return, weighted
// with MppiWeights: μ their weighted mean, σ their weighted deviation, clipped to [min_std, max_std]. The predicted return
// is the weighted mean of the last K. A return that is not finite counts as -inf; in an iteration without a finite one an
// agent keeps μ and σ, and its predicted return is -inf. Continuous actions only.
PlanResult RunMppi(const config::v1::Mppi& mppi, const PlanProblem& problem);

}  // namespace orrery
