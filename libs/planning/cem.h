// The cross-entropy method over plans of N agents at once, for any objective.
#pragma once

#include <torch/torch.h>

#include <functional>

#include "libs/config/config.h"
#include "libs/planning/planner.h"

namespace orrery {

struct CemProblem {
  int64_t agents = 1;
  int64_t action_size = 1;
  bool discrete = false;  // plans are one-hot instead of in [-1, 1]
  torch::TensorOptions options = torch::TensorOptions(torch::kFloat);
  // Standard normals [H, N, J, A] of iteration i.
  std::function<torch::Tensor(int64_t i)> draw;
  // Returns [N, J] of the plans [H, N, J, A] of iteration i.
  std::function<torch::Tensor(const torch::Tensor& plans, int64_t i)> objective;
};

// Continuous: μ = 0, σ = 1, then I times: J plans clip(μ + σ·noise, -1, 1), the K best by return, μ their mean and
// σ = max(sqrt(population variance + 1e-6), std_floor). Discrete: categorical probabilities instead of μ, uniform at
// first, refitted on the K best and kept above 0.1 / choices (noise becomes Gumbel noise); `action` is one-hot.
// A return that is not finite counts as -inf. With fewer than K finite ones the refit takes those; an agent with none
// keeps its mean and is done; its predicted return is then -inf.
PlanResult RunCem(const config::v1::Cem& cem, const CemProblem& problem);

}  // namespace orrery
