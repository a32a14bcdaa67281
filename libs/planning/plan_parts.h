// Parts that several planning algorithms share. Shapes as in plan_problem.h; K elites. Functions without state.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "libs/planning/plan_problem.h"

namespace orrery {

// Random numbers of N agents: agent n's come from seeds[n] alone. Each kind of device draws with generators of its own, so a
// seed means other numbers on CUDA than on the CPU. Not thread-safe.
class AgentNormals {
 public:
  AgentNormals(absl::Span<const uint64_t> seeds, torch::Device device);
  // As PlanProblem::normals.
  torch::Tensor Draw(at::IntArrayRef sizes);
  // Begins anew with as many other seeds.
  void Reseed(absl::Span<const uint64_t> seeds);
  const std::vector<torch::Generator>& generators() const { return generators_; }

 private:
  const torch::Device device_;
  std::vector<torch::Generator> generators_;
};

// What CEM, iCEM and MPPI refine.
struct PlanDistribution {
  torch::Tensor mean;  // [H, N, 1, A]; discrete: probabilities
  torch::Tensor std;   // [H, N, 1, A]
};

// The best plans of one iteration.
struct Elites {
  torch::Tensor plans;    // [H, N, K, A], best first
  torch::Tensor returns;  // [N, K]
  torch::Tensor finite;   // [N, K] float: 1 where the return is finite, else 0: such a plan does not count
};

// Weighted mean and population variance.
struct PlanFit {
  torch::Tensor mean;      // [H, N, 1, A]
  torch::Tensor variance;  // [H, N, 1, A]
};

// The best plan of each agent so far.
struct BestPlan {
  torch::Tensor plan;     // [H, N, 1, A]
  torch::Tensor returns;  // [N]; -inf: none was finite
};

// Uniform in [0, 1] from standard normals.
torch::Tensor ToUniform(const torch::Tensor& normals);
// 1 at the largest entry of the last dimension, else 0.
torch::Tensor OneHot(const torch::Tensor& x);
// One entry of the last dimension drawn in proportion to `weights` (at least 0, one above 0) by as many standard normals,
// as its index or one-hot; the shapes are broadcast.
torch::Tensor SampleIndex(const torch::Tensor& weights, const torch::Tensor& normals);
torch::Tensor SampleOneHot(const torch::Tensor& weights, const torch::Tensor& normals);
// `count` plans of each agent, [H, N, count, A]: uniform in [-1, 1] or, discrete, among the valid choices.
torch::Tensor UniformPlans(const PlanProblem& problem, int64_t horizon, int64_t count);

// Mean 0 (discrete: uniform over the valid choices), or the previous plan of those that have one, and this deviation.
PlanDistribution StartDistribution(const PlanProblem& problem, int64_t horizon, double deviation);
// Plans [H, N, J, A] by standard normals of that shape: clip(mean + std · normals, -1, 1), or one-hot; the first ones are the
// problem's proposals.
torch::Tensor SamplePlans(const PlanProblem& problem, const PlanDistribution& distribution, const torch::Tensor& normals);
// [N] int64: what MaskNonFinite counts in.
torch::Tensor NoneNonFinite(const PlanProblem& problem);
// Adds each agent's number of returns [N, J] that are not finite to `non_finite` [N] and makes them -inf.
torch::Tensor MaskNonFinite(const torch::Tensor& returns, torch::Tensor& non_finite);
// The plans [H, N, K, A] at `index` [N, K] of plans [H, N, J, A].
torch::Tensor PickPlans(const torch::Tensor& plans, const torch::Tensor& index);
// The k plans with the largest returns [N, J], none of which is NaN.
Elites TakeElites(const torch::Tensor& plans, const torch::Tensor& returns, int64_t k);
// Mean return [N] of the elites that count; 0 where none does.
torch::Tensor MeanReturn(const Elites& elites);
// `weight` [N, K] adds up to 1 for each agent.
PlanFit FitPlans(const torch::Tensor& plans, const torch::Tensor& weight);
// Refits on the elites that count: std = sqrt(variance + 1e-6), discrete probabilities of valid choices at least 0.1 / A
// before they are normalised again; then new = momentum · old + (1 - momentum) · refit, std at least `std_floor`. The
// agents in `keep` ([N] bool) keep what they have.
void Refit(const PlanProblem& problem, const Elites& elites, double momentum, double std_floor, const torch::Tensor& keep,
           PlanDistribution& distribution);
// None yet; the plan is the distribution's mean.
BestPlan NoPlanYet(const PlanDistribution& distribution);
// Takes an agent's plan with the largest of `returns` [N, J] where that is larger than what it has.
void KeepBetter(const torch::Tensor& plans, const torch::Tensor& returns, BestPlan& best);
// Answers with the first action of `mean`; the predicted return is still to be set.
PlanResult MakeResult(const PlanProblem& problem, const torch::Tensor& mean, const torch::Tensor& deviation,
                      const torch::Tensor& non_finite);

}  // namespace orrery
