// One step of learning: loss, gradient, clipping, Adam.
#pragma once

#include <torch/torch.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/config/config.h"
#include "libs/world_model/world_model.h"

namespace orrery {

struct LossAndGradients {
  LossOutputs outputs;
  std::vector<torch::Tensor> gradients;  // of loss_total, in the order of model.named_parameters(); empty when not asked
};

// Loss and gradients of one batch: the path of every update and of `orrery inspect loss`. INVALID_ARGUMENT names the
// tensor of batch or noise that does not fit the model.
absl::StatusOr<LossAndGradients> ComputeLoss(const WorldModel& model, const Batch& batch, const LossNoise& noise,
                                             bool with_overshooting, bool gradients);

// The batch's part of these checks.
absl::Status CheckBatch(const config::v1::Model& config, const Batch& batch);

struct UpdateResult {
  // By term: "total", "observation", "reward", "kl" and, where it is configured, "overshooting".
  std::map<std::string, double> losses;
  double gradient_norm = 0;  // before clipping
  bool skipped = false;      // loss or gradient was not finite: parameters and optimizer are as they were
};

// Fits a model with Adam. One thread; shares the model with its caller, who must not change its parameters, and must have
// moved it to its device before.
//
//   Batch batch{model->Preprocess(stored.observations, generator), stored.action, stored.reward, stored.is_first};
//   ASSIGN_OR_RETURN(UpdateResult result, updater.Update(batch, generator));
class Updater {
 public:
  // `learning` must be valid (config.h).
  Updater(std::shared_ptr<WorldModel> model, const config::v1::Learning& learning);

  // Draws the loss's noise from `generator`. INVALID_ARGUMENT: the batch does not fit the model; nothing changed.
  absl::StatusOr<UpdateResult> Update(const Batch& batch, torch::Generator& generator);

  // Updates that were not skipped.
  int64_t steps() const { return steps_; }
  // Optimizer state for a checkpoint: "adam.m.<parameter>", "adam.v.<parameter>" and "adam.step" (int64 scalar). Copies.
  TensorMap State() const;
  // Takes such a state, which may hold other tensors too (those not named "adam.…" are left alone). INVALID_ARGUMENT
  // names the first tensor that is missing, unknown, of another shape or not finite; then nothing changed.
  absl::Status Restore(const TensorMap& state);

 private:
  void Step(const std::vector<torch::Tensor>& gradients);

  const std::shared_ptr<WorldModel> model_;
  const double learning_rate_, epsilon_, clip_;
  std::vector<std::string> names_;
  std::vector<torch::Tensor> parameters_, first_moments_, second_moments_;
  int64_t steps_ = 0;
};

}  // namespace orrery
