// Planning from a belief: one interface for every algorithm.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "libs/config/config.h"
#include "libs/planning/plan_problem.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// Standard normals of CEM, given for exact checks.
struct PlanNoise {
  torch::Tensor action;  // [N, I, H, J, A]
  torch::Tensor state;   // [N, I, H, J, S]
};

// What is planned for N agents. Refers to the seeds; they must outlive the call.
struct PlanRequest {
  LatentState belief;
  absl::Span<const uint64_t> seeds;  // [N]
  // [N, H, A], H the planner's warm_start_horizon: each agent's last plan after ShiftPlan. Undefined, or a planner that
  // starts anew at each call: none.
  torch::Tensor previous_plan;
  torch::Tensor has_previous;   // [N] bool, needed beside previous_plan: agents that have one
  torch::Tensor valid_actions;  // [N, A] bool, at least one true per agent; discrete only. Undefined: all are valid
};

// Thread-safe: holds only options, and on CUDA what was recorded of plans with the last model. Destroy it before that model.
class Planner {
 public:
  virtual ~Planner() = default;
  // Plans for N agents together; agent i draws everything random from seeds[i] alone, so its answer does not depend on
  // its company. Call under torch::NoGradGuard or InferenceMode. INVALID_ARGUMENT names what does not fit the model.
  virtual absl::StatusOr<PlanResult> Plan(const WorldModel& model, const PlanRequest& request) const = 0;
  // The same with given noise. UNIMPLEMENTED where an algorithm takes none.
  virtual absl::StatusOr<PlanResult> PlanWithNoise(const WorldModel& model, const LatentState& belief,
                                                   const PlanNoise& noise) const;
  // Actions of the plan that the next call wants to begin from; 0: it begins anew.
  virtual int64_t warm_start_horizon() const { return 0; }
};

// What is left of a plan [N, H, A] (PlanResult::mean) once its first action is done: shifted by one step, the last action
// repeated, inside [-1, 1].
torch::Tensor ShiftPlan(const torch::Tensor& plan);

// INVALID_ARGUMENT names the option that is wrong or does not fit the action.
absl::StatusOr<std::unique_ptr<Planner>> MakePlanner(const config::v1::Planner& config,
                                                     const config::v1::Model& model);

}  // namespace orrery
