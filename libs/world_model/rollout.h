// Returns of many imagined rollouts on the CPU: one pass through all steps with the weights in the cache, without LibTorch's
// operations in between and without allocation in the loop.
#pragma once

#include <torch/torch.h>

#include <deque>
#include <vector>

#include "libs/world_model/parallel_rows.h"
#include "libs/world_model/rollout_kernel.h"

namespace orrery {

// Owns the weights of a RolloutModel. Not copied: the model points into it.
class PackedModel {
 public:
  // For kernels with so many features to a word.
  explicit PackedModel(int pair) : pair_(pair) {}
  PackedModel(const PackedModel&) = delete;
  PackedModel& operator=(const PackedModel&) = delete;

  // weights [N, K_i] of inputs that lie one after another, bias [N], on any device.
  RolloutLayer Layer(const std::vector<torch::Tensor>& weights, const torch::Tensor& bias);
  RolloutHead Head(std::vector<RolloutLayer> layers);

  RolloutModel model;

 private:
  const int pair_;
  std::deque<std::vector<float>> storage_;
  std::deque<std::vector<RolloutLayer>> heads_;
};

// Kernels that this processor can run, the fastest first. Those with bfloat16 round weights and activations to 8 bits of
// mantissa, sums stay in float32.
std::vector<RolloutKernel> RolloutKernels();
// The fastest; with float32 only, or bfloat16 where there is one.
const RolloutKernel& BestRolloutKernel(bool bfloat16);

// By the workers, or without them on the calling thread. A candidate's return does not depend on what else is computed.
void Roll(const RolloutKernel& kernel, const RolloutModel& model, const RolloutArrays& arrays,
          RowWorkers* workers);

}  // namespace orrery
