// Planning from a belief: one interface for every algorithm.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "libs/config/config.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// Standard normals of CEM, given for exact checks.
struct PlanNoise {
  torch::Tensor action;  // [N, I, H, J, A]
  torch::Tensor state;   // [N, I, H, J, S]
};

struct PlanResult {
  torch::Tensor action;            // [N, A]: the first action of the mean
  torch::Tensor mean;              // [N, H, A]
  torch::Tensor std;               // [N, H, A]
  torch::Tensor predicted_return;  // [N]: mean return of the last iteration's elites
  int64_t non_finite_plans = 0;    // plans whose return was not finite (counted as -inf)
};

// Thread-safe: holds only options.
class Planner {
 public:
  virtual ~Planner() = default;
  // Plans for N agents together; agent i draws everything random from seeds[i] alone, so its answer does not depend on
  // its company. Call under torch::NoGradGuard or InferenceMode.
  virtual absl::StatusOr<PlanResult> Plan(const WorldModel& model, const LatentState& belief,
                                          absl::Span<const uint64_t> seeds) const = 0;
  // The same with given noise. UNIMPLEMENTED where an algorithm takes none.
  virtual absl::StatusOr<PlanResult> PlanWithNoise(const WorldModel& model, const LatentState& belief,
                                                   const PlanNoise& noise) const = 0;
};

// INVALID_ARGUMENT names the option that is wrong or does not fit the action.
absl::StatusOr<std::unique_ptr<Planner>> MakePlanner(const config::v1::Planner& config,
                                                     const config::v1::Model& model);

}  // namespace orrery
