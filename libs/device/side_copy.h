// Copies of host memory on a device, made beside what the device does meanwhile.
#pragma once

#include <c10/core/Stream.h>
#include <torch/torch.h>

#include <optional>
#include <vector>

namespace orrery {

// Copies on a stream of its own. Not thread-safe, but bound to no thread.
//
//   SideCopy to_device(torch::Device("cuda"));
//   const std::vector<torch::Tensor> there = to_device.Copy({pinned});  // on a thread beside that of the update
class SideCopy {
 public:
  explicit SideCopy(torch::Device device);

  // Defined tensors of the host; those in pinned memory are copied without the processor. Returns when the copies are complete:
  // any stream may read them, and the tensors may be written again. Whoever reads a copy holds it until the device has done so,
  // for the next copies may take its memory. On a CPU these are the tensors themselves. Throws c10::Error when the device fails.
  std::vector<torch::Tensor> Copy(std::vector<torch::Tensor> tensors);

 private:
  std::optional<c10::Stream> stream_;  // none on a CPU
};

}  // namespace orrery
