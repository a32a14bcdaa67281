// Devices by their names.
#pragma once

#include <torch/torch.h>

#include <string>

#include "absl/status/statusor.h"

namespace orrery {

// "cpu", "cuda" or "cuda:1". INVALID_ARGUMENT for anything else or a device that is not there.
absl::StatusOr<torch::Device> ParseDevice(const std::string& name);

}  // namespace orrery
