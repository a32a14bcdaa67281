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
#include "libs/learning/data_parallel.h"
#include "libs/world_model/behavior.h"
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

// Of a model with model.behavior: the losses of actor and value, imagined from the posterior states of `loss`, and their gradients
// (empty when not asked) in the order of model.named_parameters(). The path of every update and of `orrery inspect loss`.
struct BehaviorAndGradients {
  BehaviorOutputs outputs;
  std::vector<torch::Tensor> actor;  // of outputs.loss_actor by the parameters "actor.…"
  std::vector<torch::Tensor> value;  // of outputs.loss_value by the parameters "value.…"
};
BehaviorAndGradients ComputeBehavior(const WorldModel& model, const LossOutputs& loss, const BehaviorNoise& noise, bool gradients);

// The batch's part of these checks.
absl::Status CheckBatch(const config::v1::Model& config, const Batch& batch);

// Names of everything that an update may report, in the order of a table.
const std::vector<std::string>& LossTerms();

struct UpdateResult {
  // By term: "total", "observation", "reward", "kl", and the others of LossTerms where they are configured.
  std::map<std::string, double> losses;
  double gradient_norm = 0;  // of the model, before clipping
  double learning_rate = 0;  // of the model, as the schedule left it
  bool skipped = false;      // a loss or gradient was not finite: parameters and optimizer are as they were
};

// Fits a model with Adam, and with model.behavior its actor and value in imagination from the batch's posterior states.
// Learning rates follow learning.rate_schedule by steps(). One thread; shares the model with its caller, who must not change
// its parameters, and must have moved it to its device before.
//
// With several ranks each gives its part of the batch, as many columns as any other, and a generator in the same state. All draw
// the noise of the whole batch and take that of their columns; gradients and losses are means over ranks. So ranks that begin
// with equal parameters make the step that one process would make from the whole batch, up to rounding, where a loss is a
// mean over rows; and they stay equal, for they skip alike. (A mean over rows that count, as with absent modalities or in
// overshooting, becomes the mean of the ranks' means.)
//
//   Batch batch{model->Preprocess(stored.observations, generator), stored.action, stored.reward, stored.is_first};
//   ASSIGN_OR_RETURN(UpdateResult result, updater.Update(batch, generator));
class Updater {
 public:
  // `learning` must be valid (config.h). `ranks` must outlive the updater; null: it learns alone.
  Updater(std::shared_ptr<WorldModel> model, const config::v1::Learning& learning, DataParallel* ranks = nullptr);

  // Draws the loss's noise from `generator`. INVALID_ARGUMENT: the batch does not fit the model; nothing changed. UNAVAILABLE: the
  // group has failed; nothing changed.
  absl::StatusOr<UpdateResult> Update(const Batch& batch, torch::Generator& generator);

  // The same without waiting for the device, so that it can be recorded in a graph (libs/device/captured_step.h): whether the
  // update is skipped is decided on the device. The result is what Read takes: float32 on the device. For every time that this
  // is done, Read must be called once, in the same order. Gradients are clipped and steps taken as in Update, up to rounding.
  // Ranks wait for the device: with several, use Update.
  absl::StatusOr<torch::Tensor> Enqueue(const Batch& batch, torch::Generator& generator);
  // What such an update did. Waits for the device.
  UpdateResult Read(const torch::Tensor& values);

  // Updates that were not skipped, as far as they have been read.
  int64_t steps() const { return steps_; }
  // Optimizer state for a checkpoint: "adam.m.<parameter>", "adam.v.<parameter>" and "adam.step" (int64 scalar). Copies.
  TensorMap State() const;
  // Takes such a state, which may hold other tensors too (those not named "adam.…" are left alone). INVALID_ARGUMENT
  // names the first tensor that is missing, unknown, of another shape or not finite; then nothing changed.
  absl::Status Restore(const TensorMap& state);

 private:
  // Parameters that learn from one loss.
  struct Group {
    double learning_rate = 0;
    std::vector<std::string> names;
    std::vector<torch::Tensor> parameters, first_moments, second_moments;
  };
  // What a group steps by.
  struct Gradients {
    Group* group;
    std::vector<torch::Tensor> tensors;
  };

  // Of one batch, before anything is changed.
  struct Computed {
    std::vector<Gradients> gradients;
    std::vector<std::pair<const char*, torch::Tensor>> terms;  // names as in UpdateResult
    torch::Tensor values;  // norms of the gradients, then the terms: on the device
  };
  absl::StatusOr<Computed> Compute(const Batch& batch, torch::Generator& generator);
  // Both drawn for the whole batch; this rank's part of it.
  LossNoise DrawLossNoise(const Batch& batch, torch::Generator& generator) const;
  BehaviorNoise DrawNoiseOfBehavior(const LossOutputs& o, torch::Generator& generator) const;
  // Gradients and terms become their means over ranks.
  absl::Status Average(Computed& computed);
  // Appends the actor's and the value's gradients and losses.
  void AddBehavior(const LossOutputs& o, torch::Generator& generator, std::vector<Gradients>& gradients,
                   std::vector<std::pair<const char*, torch::Tensor>>& terms);
  // Adam's step number device_steps_ by `rate`, a number or a float32 scalar on the device; none where `skip` (float32 scalar)
  // is 1.
  template <typename Rate>
  void Step(Group& group, const std::vector<torch::Tensor>& gradients, const Rate& rate,
            const c10::optional<torch::Tensor>& skip);
  std::vector<Group*> groups() { return {&model_group_, &actor_group_, &value_group_}; }
  std::vector<const Group*> groups() const { return {&model_group_, &actor_group_, &value_group_}; }

  const std::shared_ptr<WorldModel> model_;
  const config::v1::RateSchedule schedule_;
  const double epsilon_, clip_;
  DataParallel* const ranks_;  // may be null
  Group model_group_, actor_group_, value_group_;  // the last two are empty without model.behavior
  int64_t steps_ = 0;
  torch::Tensor device_steps_;               // the same on the device, float32 scalar
  std::vector<const char*> enqueued_terms_;  // of the values that Enqueue gave, behind the norms
};

}  // namespace orrery
