// Dense layers as the networks of the model use them. Plain values that share their parameters' storage.
#pragma once

#include <torch/torch.h>

#include <vector>

#include "libs/world_model/activation.h"

namespace orrery {

struct Layer {
  torch::Tensor weight, bias;
  torch::Tensor norm_weight, norm_bias;  // of a layer normalisation before the activation; undefined: none

  torch::Tensor operator()(const torch::Tensor& x) const { return at::linear(x, weight, bias); }
  // What follows the product in a hidden layer.
  torch::Tensor Finish(Activation activation, const torch::Tensor& y) const {
    if (!norm_weight.defined()) return Activate(activation, y);
    return Activate(activation, at::layer_norm(y, {y.size(-1)}, norm_weight, norm_bias, /*eps=*/1e-3));
  }
  torch::Tensor Hidden(Activation activation, const torch::Tensor& x) const { return Finish(activation, (*this)(x)); }
};

// Hidden layers and an output.
struct Mlp {
  std::vector<Layer> hidden;
  Layer out;
  Layer raw_std;  // second output layer, where a deviation is learned for every output

  torch::Tensor Feature(Activation activation, const torch::Tensor& x) const {
    torch::Tensor y = x;
    for (const Layer& layer : hidden) y = layer.Hidden(activation, y);
    return y;
  }
};

}  // namespace orrery
