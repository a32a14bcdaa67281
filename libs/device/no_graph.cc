// Builds without CUDA record nothing.
#include "libs/device/captured_step.h"

namespace orrery {

std::unique_ptr<DeviceGraph> MakeDeviceGraph(torch::Device, const std::vector<torch::Generator>&) { return nullptr; }

}  // namespace orrery
