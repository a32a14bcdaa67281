// Likelihoods of what the decoder and the heads predict. Pure functions.
#pragma once

#include <torch/torch.h>

#include "libs/config/config.h"

namespace orrery {

// sign(x) log(1 + |x|) and its inverse.
torch::Tensor Symlog(const torch::Tensor& x);
torch::Tensor Symexp(const torch::Tensor& x);

// softplus(raw) + 0.1: deviation of a learned likelihood.
torch::Tensor LikelihoodStd(const torch::Tensor& raw);
// Negative log-likelihood of every element: ½ ((target - mean) / std)² + log std + ½ log 2π.
torch::Tensor GaussianNll(const torch::Tensor& mean, const torch::Tensor& std, const torch::Tensor& target);

// symexp(linspace(-20, 20, 255)) [255].
torch::Tensor TwoHotBins(const torch::TensorOptions& options);
// Weights [N, 255] of the two bins beside each target [N]; targets outside count as the outermost bin.
torch::Tensor TwoHot(const torch::Tensor& target);
// -Σ TwoHot(target) log softmax(logits): [N] of logits [N, 255].
torch::Tensor TwoHotNll(const torch::Tensor& logits, const torch::Tensor& target);
// Σ softmax(logits) · bins, pairs of opposite bins first: exactly 0 where the logits are symmetric. [N].
torch::Tensor TwoHotMean(const torch::Tensor& logits);

// The reward as a head predicts it, and back to what planning adds up (TANH: as predicted).
torch::Tensor TransformReward(config::v1::RewardHead::Transform transform, const torch::Tensor& reward);
torch::Tensor PlannedReward(config::v1::RewardHead::Transform transform, const torch::Tensor& predicted);

}  // namespace orrery
