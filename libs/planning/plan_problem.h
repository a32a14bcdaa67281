// What every planning algorithm optimises, and what it answers.
//
// Shapes: H actions of a plan, N agents, J plans of each, A numbers of an action. float32.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>

namespace orrery {

// Plans for N agents at once, scored by any function. A plain value; an algorithm calls its functions on its own thread.
struct PlanProblem {
  int64_t agents = 1;
  int64_t action_size = 1;
  bool discrete = false;  // plans are one-hot instead of in [-1, 1]
  torch::TensorOptions options = torch::TensorOptions(torch::kFloat);
  torch::Tensor valid_actions;  // [N, A] bool, at least one true per agent; discrete only. Undefined: all are valid
  torch::Tensor previous_plan;  // [N, H, A] to begin from (discrete: probabilities). Undefined: none
  torch::Tensor has_previous;   // [N] bool, needed beside previous_plan: agents that have one
  torch::Tensor proposals;      // [H, N, K, A] that take the place of the first K plans of every iteration. Undefined: none
  // Standard normals of these sizes, other ones at every call. Dimension 1 counts the agents, and each has its own.
  std::function<torch::Tensor(at::IntArrayRef sizes)> normals;
  // Returns [N, J] of the plans [H, N, J, A] of iteration i.
  std::function<torch::Tensor(const torch::Tensor& plans, int64_t i)> objective;
};

struct PlanResult {
  torch::Tensor action;            // [N, A]: the first action (discrete: one-hot)
  torch::Tensor mean;              // [N, H, A]: the plan (discrete: probabilities, or one-hot)
  torch::Tensor std;               // [N, H, A]: its spread, 0 from an algorithm that keeps none
  torch::Tensor predicted_return;  // [N]: of the last elites or of the best plan, as each algorithm says; -inf: none finite
  torch::Tensor non_finite;        // [N] int64: plans of each agent whose return was not finite (counted as -inf)
  int64_t non_finite_plans = 0;    // their sum; an algorithm on a device leaves it to be set, as it would have to wait
};

}  // namespace orrery
