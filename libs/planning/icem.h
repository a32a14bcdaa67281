// iCEM: the cross-entropy method with noise that changes slowly (Pinneri et al. 2020), for any objective.
#pragma once

#include <torch/torch.h>

#include <cstdint>

#include "libs/config/config.h"
#include "libs/planning/plan_problem.h"

namespace orrery {

// White noise [H, N, J, A] (independent standard normals) becomes noise along H whose power falls with frequency f as
// 1 / f^beta, still of variance 1 at every step; frequency 0 is as strong as the lowest above it. Each agent's alone.
torch::Tensor ColourNoise(const torch::Tensor& white, double beta);

// Plans drawn in iteration i, 0 the first: candidates · candidates_decay^-i, but never fewer than 2 · elites.
int64_t IcemCandidates(const config::v1::Icem& icem, int64_t i);

// μ = 0 or the previous plan, σ = initial_std, then I times: plans clip(μ + σ·noise, -1, 1) with coloured noise, in the last
// iteration also μ; beside them the best elites of the iteration before, with the returns they had; μ and σ are refitted on
// the K best with momentum as in RunCem. The action is the first of the best plan ever seen and the predicted return is that
// plan's; `mean` is μ, from which the next call goes on. A return that is not finite counts as -inf; in an iteration
// without a finite one an agent keeps μ and σ, and when it never has one, μ is the answer. Continuous actions only.
PlanResult RunIcem(const config::v1::Icem& icem, const PlanProblem& problem);

}  // namespace orrery
