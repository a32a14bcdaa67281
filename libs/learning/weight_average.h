// The mean of a model's weights over its updates, for snapshots.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// After update n the mean is Σ_i decay^(n−i) w_i / Σ_i decay^(n−i) over the weights w_1 … w_n after each update: without
// the initial weights. Before the first update it is the weights themselves. Not thread-safe.
class WeightAverage {
 public:
  // `average`: a model of the same configuration on the same device, which takes the mean. `decay` at least 0 and below 1.
  WeightAverage(std::shared_ptr<const WorldModel> model, std::shared_ptr<WorldModel> average, double decay);

  // Takes the weights in; to be called after each update that was not skipped, whose number is `update`, 1 for the first.
  void Add(int64_t update);
  const WorldModel& model() const { return *average_; }

  // For a checkpoint: "average.<parameter>". Copies on CPU.
  TensorMap State() const;
  // Whether `state`, which may hold other tensors, has such a mean. INVALID_ARGUMENT names the first tensor that is missing or
  // of another shape or type.
  absl::Status Check(const TensorMap& state) const;
  // Takes a state that passed Check.
  void Restore(const TensorMap& state);

 private:
  const std::shared_ptr<const WorldModel> model_;
  const std::shared_ptr<WorldModel> average_;
  const double decay_;
  std::vector<torch::Tensor> weights_, means_;  // of the two models, in the same order
};

}  // namespace orrery
