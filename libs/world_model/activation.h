// Activations by their name in the configuration. Pure functions.
#pragma once

#include <torch/torch.h>

#include "libs/config/config.h"

namespace orrery {

using Activation = config::v1::Model::Activation;

inline torch::Tensor Activate(Activation activation, const torch::Tensor& x) {
  switch (activation) {
    case config::v1::Model::ELU:
      return at::elu(x);
    case config::v1::Model::TANH:
      return at::tanh(x);
    case config::v1::Model::SILU:
      return at::silu(x);
    default:
      return at::relu(x);
  }
}

// The same into `out`, without gradient.
inline void ActivateInto(Activation activation, const torch::Tensor& x, torch::Tensor& out) {
  switch (activation) {
    case config::v1::Model::ELU:
      at::elu_out(out, x);
      return;
    case config::v1::Model::TANH:
      at::tanh_out(out, x);
      return;
    case config::v1::Model::SILU:
      at::silu_out(out, x);
      return;
    default:
      at::clamp_min_out(out, x, 0);
  }
}

// Derivative at `x`, where y = Activate(x).
inline torch::Tensor ActivationSlope(Activation activation, const torch::Tensor& x, const torch::Tensor& y) {
  switch (activation) {
    case config::v1::Model::ELU:
      return (y + 1).clamp_max_(1);  // exp(x) = y + 1 below 0
    case config::v1::Model::TANH:
      return 1 - y * y;
    case config::v1::Model::SILU: {
      const torch::Tensor s = at::sigmoid(x);
      return s * (1 + x * (1 - s));
    }
    default:
      return y.gt(0).to(y.scalar_type());
  }
}

}  // namespace orrery
