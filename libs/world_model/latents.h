// The distribution of the stochastic state: Gaussian, categorical, or none at all (RNN).
#pragma once

#include <torch/torch.h>

#include "libs/config/config.h"

namespace orrery {

// Gaussian: mean and standard deviation. Categorical: `mean` holds probabilities, `std` is undefined. Shapes [N…, S].
struct LatentDistribution {
  torch::Tensor mean;
  torch::Tensor std;

  LatentDistribution Detach() const { return {mean.detach(), std.defined() ? std.detach() : std}; }
};

// Thread-safe: holds only options.
class Latents {
 public:
  explicit Latents(const config::v1::Model& model);

  // Length of the stochastic state.
  int64_t size() const { return size_; }
  // No samples and no divergence.
  bool deterministic() const { return deterministic_; }
  bool categorical() const { return classes_ > 0; }
  // Outputs of a layer to the distribution: [N…, 2S] mean and raw deviation, or [N…, S] logits.
  LatentDistribution FromOutputs(const torch::Tensor& outputs) const;
  // `noise` [N…, S]: standard normals. Gaussian: reparameterised. Categorical: one-hot by the Gumbel numbers that belong to
  // the noise, with straight-through gradients. Deterministic: the mean.
  torch::Tensor Sample(const LatentDistribution& d, const torch::Tensor& noise) const;
  // What stands for the distribution where nothing is drawn: mean, or the most probable classes.
  torch::Tensor Mode(const LatentDistribution& d) const;
  // KL(q || p) in nats, summed over the state: [N…]. Zeros when deterministic.
  torch::Tensor Divergence(const LatentDistribution& q, const LatentDistribution& p) const;
  // KL(q || standard normal), categorical: KL(q || uniform).
  torch::Tensor DivergenceFromStandard(const LatentDistribution& q) const;

 private:
  torch::Tensor Grouped(const torch::Tensor& x) const { return x.unflatten(-1, at::IntArrayRef{groups_, classes_}); }

  const int64_t groups_, classes_;  // 0: Gaussian
  const int64_t size_;
  const bool deterministic_;
  const double min_std_, uniform_mix_;
};

// A standard normal z becomes a standard Gumbel number through the distribution function of z.
torch::Tensor ToGumbel(const torch::Tensor& z);

}  // namespace orrery
