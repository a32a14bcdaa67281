#include "libs/device/parse_device.h"

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"

namespace orrery {

absl::StatusOr<torch::Device> ParseDevice(const std::string& name) {
  absl::StatusOr<torch::Device> device =
      CatchExceptions("device", [&]() -> absl::StatusOr<torch::Device> { return torch::Device(name); });
  if (!device.ok() || (!device->is_cpu() && !device->is_cuda())) {
    return absl::InvalidArgumentError(absl::StrCat("device \"", name, "\": expected cpu, cuda or cuda:N"));
  }
  if (device->is_cuda()) {
    const int64_t count = torch::cuda::is_available() ? static_cast<int64_t>(torch::cuda::device_count()) : 0;
    if (device->has_index() ? device->index() >= count : count == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("device \"", name, "\": not there, ", count, " CUDA devices were found"));
    }
  }
  return device;
}

}  // namespace orrery
