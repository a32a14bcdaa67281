// Where the learner's batches come from.
#pragma once

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// A batch as stored, before preprocessing.
struct StoredBatch {
  TensorMap observations;  // images [T, B, H, W, C] uint8, vectors [T, B, size] float32
  torch::Tensor action;    // [T, B, A] float32
  torch::Tensor reward;    // [T, B] float32
  torch::Tensor is_first;  // [T, B] uint8
  torch::Tensor is_terminal;  // [T, B] uint8
};

// One consumer thread.
class BatchSource {
 public:
  virtual ~BatchSource() = default;
  // The next batch. DEADLINE_EXCEEDED: too little data until then; CANCELLED: closed; UNAVAILABLE: replay is away and the
  // source keeps trying.
  virtual absl::StatusOr<StoredBatch> Next(absl::Time deadline) = 0;
};

}  // namespace orrery
