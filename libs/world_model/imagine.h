// What the model expects to see: posterior for some rows, then open loop.
#pragma once

#include "libs/world_model/world_model.h"

namespace orrery {

struct Imagined {
  TensorMap recon;            // [T, B, …] as preprocessed observations
  torch::Tensor reward_mean;  // [T, B]
};

// The first `context` rows (1 to T) are filtered from the batch's observations, the others predicted from its actions
// alone; is_first resets the state as in training. `noise` [T, B, S]: standard normals of the samples (zeros: means).
// Needs no rewards. Without gradient.
Imagined Imagine(const WorldModel& model, const Batch& batch, int64_t context, const torch::Tensor& noise);

}  // namespace orrery
