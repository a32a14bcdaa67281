// The decoder's transposed convolutions.
#pragma once

#include <torch/torch.h>

namespace orrery {

// at::conv_transpose2d(x, weight, bias, stride 2) of x [N, C, H, W], weight [C, O, K, K]. Differentiable.
torch::Tensor TransposedConv(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias);

}  // namespace orrery
