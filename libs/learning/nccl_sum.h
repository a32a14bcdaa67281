// Sums of tensors that lie on GPUs of several processes.
#pragma once

#include <torch/torch.h>

#include <memory>
#include <string>

#include "absl/time/time.h"

namespace orrery {

// One process's end of a communicator of NCCL. Not thread-safe. Everything throws c10::Error when it fails; builds without CUDA
// (no_nccl.cc) do so always.
class NcclSum {
 public:
  // What all processes have to give to Create, made by one of them.
  static std::string MakeId();
  // Waits for the others. `device`: a GPU of this process's own.
  static std::unique_ptr<NcclSum> Create(const std::string& id, int rank, int size, torch::Device device);
  virtual ~NcclSum() = default;
  // In place, on the current stream; waits for the device, at most `limit`. After a failure the communicator is given up.
  virtual void Run(torch::Tensor& values, absl::Duration limit) = 0;
};

}  // namespace orrery
