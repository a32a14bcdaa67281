#include "libs/world_model/rollout.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

namespace orrery {

using torch::Tensor;

RolloutLayer PackedModel::Layer(const std::vector<Tensor>& weights, const Tensor& bias) {
  std::vector<Tensor> parts;  // each filled up to whole words
  for (const Tensor& weight : weights) {
    const Tensor w = weight.detach().to(at::kCPU, at::kFloat);
    parts.push_back(at::constant_pad_nd(w, {0, w.size(1) % pair_}));
  }
  const Tensor w = at::cat(parts, 1), b = bias.detach().to(at::kCPU, at::kFloat).contiguous();
  const int64_t outputs = w.size(0), inputs = w.size(1) / pair_, tiles = (outputs + kRolloutTile - 1) / kRolloutTile;
  const Tensor padded = at::constant_pad_nd(w, {0, 0, 0, tiles * kRolloutTile - outputs});
  const Tensor tiled = padded.view({tiles, kRolloutTile, inputs, pair_}).transpose(1, 2).contiguous();
  const Tensor words = pair_ == 1 ? tiled : tiled.to(at::kBFloat16);
  std::vector<float>& packed = storage_.emplace_back(tiles * inputs * kRolloutTile);
  std::memcpy(packed.data(), words.const_data_ptr(), packed.size() * sizeof(float));
  std::vector<float>& biases = storage_.emplace_back(tiles * kRolloutTile);
  std::copy_n(b.const_data_ptr<float>(), outputs, biases.begin());
  return {inputs, outputs, packed.data(), biases.data()};
}

RolloutHead PackedModel::Head(std::vector<RolloutLayer> layers) {
  const std::vector<RolloutLayer>& head = heads_.emplace_back(std::move(layers));
  return {head.data(), std::ssize(head)};
}

std::vector<RolloutKernel> RolloutKernels() {
  std::vector<RolloutKernel> kernels;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) kernels.push_back(kRolloutAvx512bf16);
  if (__builtin_cpu_supports("avx512f")) kernels.push_back(kRolloutAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) kernels.push_back(kRolloutAvx2);
#endif
  kernels.push_back(kRolloutPortable);
  return kernels;
}

const RolloutKernel& BestRolloutKernel(bool bfloat16) {
  static const std::vector<RolloutKernel> kernels = RolloutKernels();
  return *std::find_if(kernels.begin(), kernels.end(), [&](const RolloutKernel& k) { return bfloat16 || k.pair == 1; });
}

void Roll(const RolloutKernel& kernel, const RolloutModel& model, const RolloutArrays& arrays, RowWorkers* workers) {
  const int64_t blocks = (arrays.candidates + kernel.rows - 1) / kernel.rows, all = arrays.agents * blocks;
  const int64_t tasks = workers == nullptr ? 1 : std::min<int64_t>(all, workers->threads());
  std::atomic<int64_t> next = 0;
  const auto roll = [&](int64_t) {
    std::vector<float> work(static_cast<size_t>(WorkRows(model) * kernel.rows));
    for (int64_t i; (i = next.fetch_add(1)) < all;) {
      const int64_t first = i % blocks * kernel.rows;
      kernel.roll_block(model, arrays, i / blocks, first, std::min<int64_t>(kernel.rows, arrays.candidates - first),
                        work.data());
    }
  };
  if (workers == nullptr) return roll(0);
  workers->Run(tasks, roll);
}

}  // namespace orrery
