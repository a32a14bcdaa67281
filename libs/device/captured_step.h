// A step of fixed shapes that a device repeats: recorded once as a graph, then replayed without dispatching its operations.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <memory>
#include <vector>

namespace orrery {

// A recording of a device's work. Not thread-safe.
class DeviceGraph {
 public:
  virtual ~DeviceGraph() = default;
  // Runs `work` on the stream on which it will be recorded; returns when the device has done it.
  virtual void RunAside(const std::function<void()>& work) = 0;
  // Calls `work` and records what it asks of the device, which does nothing of it. `work` must not wait for the device, nor
  // read or write memory of the host. Throws what `work` throws, and c10::Error when it did one of these; then nothing is
  // recorded.
  virtual void Record(const std::function<void()>& work) = 0;
  // Does what was recorded, on the current stream, with what its tensors hold now.
  virtual void Replay() = 0;
};

// For steps on `device` that draw from `generators` (of that device), which give new numbers at each replay. Null where
// nothing can be recorded: on a CPU, in a build without CUDA, and with ORRERY_CUDA_GRAPHS=0 in the environment.
std::unique_ptr<DeviceGraph> MakeDeviceGraph(torch::Device device, const std::vector<torch::Generator>& generators);

// Repeats a step. With a graph the first runs call it, as LibTorch's libraries set themselves up then; the next one records
// it, and from then on it is replayed. Every run does the step once, whichever way. Not thread-safe.
//
//   CapturedStep step(device, [&](const auto& in) { return std::vector{at::relu(in[0])}; }, MakeDeviceGraph(device, {}));
//   const torch::Tensor y = step.Run({x})[0].clone();
class CapturedStep {
 public:
  // From tensors on the device to tensors there. What else it reads or changes must be tensors that stay where they are, and
  // it must choose by itself whether gradients are kept.
  using Step = std::function<std::vector<torch::Tensor>(const std::vector<torch::Tensor>& inputs)>;
  // Calls of the step before it is recorded.
  static constexpr int kWarmUps = 2;

  // `graph` may be null: then every run calls the step.
  CapturedStep(torch::Device device, Step step, std::unique_ptr<DeviceGraph> graph);

  // Defined tensors of any device, of the same shapes and types at every run. Inputs in pinned memory must stay as they are
  // until the outputs have been read. The outputs may be overwritten by the next run. Throws c10::Error when an input does
  // not fit, and what the step throws.
  std::vector<torch::Tensor> Run(const std::vector<torch::Tensor>& inputs);

 private:
  // Copies to where the graph reads.
  void Fill(const std::vector<torch::Tensor>& inputs);

  const torch::Device device_;
  const Step step_;
  const std::unique_ptr<DeviceGraph> graph_;
  int warm_ups_ = 0;
  bool recorded_ = false;
  std::vector<torch::Tensor> inputs_, outputs_;
};

}  // namespace orrery
