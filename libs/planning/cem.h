// The cross-entropy method over plans of N agents at once, for any objective.
#pragma once

#include <torch/torch.h>

#include <functional>

#include "libs/config/config.h"
#include "libs/planning/plan_problem.h"

namespace orrery {

struct CemProblem : PlanProblem {
  // Standard normals [H, N, J, A] of iteration i. Unset: `normals`.
  std::function<torch::Tensor(int64_t i)> draw;
};

// Continuous: μ = 0, σ = 1, then I times: J plans clip(μ + σ·noise, -1, 1), the K best by return, μ their mean and
// σ = max(sqrt(population variance + 1e-6), std_floor). Discrete: categorical probabilities instead of μ, uniform at
// first, refitted on the K best and kept above 0.1 / choices (noise becomes Gumbel noise); `action` is one-hot.
// With momentum m a refit is m · old + (1 - m) · new. A previous plan takes the place of the first μ.
// A return that is not finite counts as -inf. With fewer than K finite ones the refit takes those; an agent with none
// keeps its mean and is done; its predicted return is then -inf, else the mean return of its last elites. An agent whose
// largest σ is below early_stop_std is done, too, whatever the others do; when all are, the search ends.
PlanResult RunCem(const config::v1::Cem& cem, const CemProblem& problem);

}  // namespace orrery
