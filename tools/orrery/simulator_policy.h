// CEM with the true simulator as its model.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/config/config.h"
#include "libs/envs/environment.h"
#include "libs/world_model/parallel_rows.h"
#include "tools/orrery/policy.h"

namespace orrery {

// Plans every action anew by playing candidate plans in copies of the environment's present state: what planning reaches
// with a perfect model, and so the upper bound for any learned one. Actions follow from the episode's seed, whatever the
// number of threads. A plan that the simulator cannot follow counts as the worst. Not thread-safe; Act may not run beside a
// call on the environment.
class SimulatorPolicy : public Policy {
 public:
  // Plans for `environment`, which must outlive the policy, on `threads` threads (at least 1). INVALID_ARGUMENT for an
  // option out of range, UNIMPLEMENTED for an environment that cannot look ahead.
  static absl::StatusOr<std::unique_ptr<SimulatorPolicy>> Create(const Environment& environment,
                                                                 const config::v1::Cem& cem, int threads);
  void Begin(uint64_t seed) override;
  // For the environment's present state; the observation is not looked at.
  absl::StatusOr<std::vector<float>> Act(const ArrayMap& observation) override;

 private:
  SimulatorPolicy(ActionSpec spec, const config::v1::Cem& cem, std::vector<std::unique_ptr<Lookahead>> lookaheads);
  // Returns [1, J] of the plans [H, 1, J, A]; sets `failure` where the simulator failed otherwise than by a plan.
  torch::Tensor Returns(const torch::Tensor& plans, absl::Status& failure);

  // Constant after construction.
  const ActionSpec spec_;
  const config::v1::Cem cem_;
  const std::vector<std::unique_ptr<Lookahead>> lookaheads_;  // one per thread

  uint64_t seed_ = 0;
  uint64_t row_ = 0;
  RowWorkers workers_;
};

}  // namespace orrery
