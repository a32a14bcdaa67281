#include "libs/device/side_copy.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace orrery {

SideCopy::SideCopy(torch::Device device) {
  if (device.is_cpu()) return;
  // Streams of graphs come from the other pool (cuda_graph.cc): no copy must end up in a recording.
  stream_ = c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device, /*isHighPriority=*/true);
}

std::vector<torch::Tensor> SideCopy::Copy(std::vector<torch::Tensor> tensors) {
  if (!stream_.has_value()) return tensors;
  const c10::StreamGuard guard(*stream_);
  std::vector<torch::Tensor> copies;
  for (const torch::Tensor& tensor : tensors) copies.push_back(tensor.to(stream_->device(), /*non_blocking=*/true));
  stream_->synchronize();
  return copies;
}

}  // namespace orrery
