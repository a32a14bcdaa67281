#include "libs/world_model/transposed_conv.h"

namespace orrery {
namespace {

using torch::Tensor;

// Output channels up to which the CPU's transposed convolution wastes most of its vectors.
constexpr int64_t kFewChannels = 8;

// From 1×1 every output is a product of its own.
Tensor FromOnePixel(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t out = weight.size(1), k = weight.size(2);
  const Tensor spread = bias.unsqueeze(1).expand({out, k * k}).reshape({out * k * k});
  return at::addmm(spread, x.flatten(1), weight.flatten(1)).view({x.size(0), out, k, k});
}

// With stride 2 and an even kernel the four phases of the output (even or odd row and column) are each a convolution of
// half the kernel's size: one ordinary convolution with four times the channels gives them all.
Tensor ByPhases(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t in = weight.size(0), out = weight.size(1), half = weight.size(2) / 2;
  const Tensor phases = weight.view({in, out, half, 2, half, 2})
                            .permute({3, 5, 1, 0, 2, 4})
                            .flip({4, 5})
                            .reshape({4 * out, in, half, half});
  const Tensor y = at::conv2d(x.contiguous(at::MemoryFormat::ChannelsLast), phases, bias.repeat(4), /*stride=*/1,
                              /*padding=*/half - 1);
  const int64_t n = y.size(0), h = y.size(2), w = y.size(3);
  // In memory [N, H, W, row phase, column phase, C]: whole runs of [column phase, C] move.
  return y.permute({0, 2, 3, 1})
      .view({n, h, w, 2, 2 * out})
      .transpose(2, 3)
      .reshape({n, 2 * h, 2 * w, out})
      .permute({0, 3, 1, 2});
}

}  // namespace

Tensor TransposedConv(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  if (x.size(2) == 1 && x.size(3) == 1) return FromOnePixel(x, weight, bias);
  if (x.is_cpu() && weight.size(1) <= kFewChannels && weight.size(2) % 2 == 0) return ByPhases(x, weight, bias);
  // A GPU's tensor cores take channels last.
  const Tensor laid_out = x.is_cuda() ? x.contiguous(at::MemoryFormat::ChannelsLast) : x;
  return at::conv_transpose2d(laid_out, weight, bias, /*stride=*/2);
}

}  // namespace orrery
