// A model in training: parameters, optimizer and randomness, as one thing that can be saved and restored.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/config/config.h"
#include "libs/device/captured_step.h"
#include "libs/learning/batch_source.h"
#include "libs/learning/data_parallel.h"
#include "libs/learning/update.h"
#include "libs/learning/weight_average.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// Not thread-safe. On CPU the same seed and the same batches give the same parameters, bit by bit, whether or not the state
// went through State and Restore in between.
class Trainer {
 public:
  // `model` complete; both valid; `threads` share an update on the CPU; `bfloat16`: WorldModel::UseBfloat16. `group` (update.h)
  // must outlive the trainer; null: it learns alone. INVALID_ARGUMENT or INTERNAL: the model cannot be made on that device.
  static absl::StatusOr<std::unique_ptr<Trainer>> Create(const config::v1::Model& model,
                                                         const config::v1::Learning& learning, uint64_t seed,
                                                         torch::Device device, int threads, bool bfloat16 = false,
                                                         DataParallel* group = nullptr);
  // One update from a batch as stored: to the device, preprocessed, then the updater. On CUDA the whole of it is one graph, and
  // all batches must be of one shape; those of a MirroredSource lie there already. The device has read the batch when this
  // returns. In a group it is no graph, and `batch` is this rank's part. INVALID_ARGUMENT names what is missing; INTERNAL:
  // LibTorch failed; UNAVAILABLE: the group has failed.
  absl::StatusOr<UpdateResult> Update(const StoredBatch& batch);

  // "param.<name>", the optimizer's "adam.…", "random.generator" and, with learning.weight_average_decay, "average.<name>".
  // Copies on CPU.
  TensorMap State() const;
  // Takes such a state. INVALID_ARGUMENT names the first tensor that is missing or of another shape or type; then nothing
  // changed. Without `with_random` the generator goes on as it is.
  absl::Status Restore(const TensorMap& state, bool with_random);

  const WorldModel& model() const { return *model_; }
  // What snapshots hold: with learning.weight_average_decay the mean of the weights (weight_average.h), else the model.
  const WorldModel& published() const { return average_ == nullptr ? *model_ : average_->model(); }

 private:
  Trainer(std::shared_ptr<WorldModel> model, std::unique_ptr<WeightAverage> average, const config::v1::Learning& learning,
          torch::Generator generator, torch::Device device, DataParallel* group);
  absl::StatusOr<UpdateResult> MakeUpdate(const StoredBatch& batch);
  absl::Status CheckParameters(const TensorMap& state) const;
  // A batch's tensors in a fixed order: modalities, action, reward, is_first and, with a continue head, is_terminal.
  absl::StatusOr<std::vector<torch::Tensor>> Flatten(const StoredBatch& stored) const;
  // Such tensors, on the device, as the model takes them.
  Batch Prepare(const std::vector<torch::Tensor>& stored);
  // WorldModel::Preprocess; in a group with the noise that the whole batch would get.
  TensorMap Preprocess(const TensorMap& stored);

  const torch::Device device_;
  DataParallel* const group_;  // may be null
  std::shared_ptr<WorldModel> model_;
  const std::unique_ptr<WeightAverage> average_;  // may be empty
  torch::Generator generator_;
  Updater updater_;
  CapturedStep step_;  // preprocessing and update on CUDA; refers to this object
};

}  // namespace orrery
