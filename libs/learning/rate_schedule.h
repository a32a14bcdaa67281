// What is left of the learning rates at an update.
#pragma once

#include <torch/torch.h>

#include <cstdint>

#include "libs/config/config.h"

namespace orrery {

// The factor by which update number `update` multiplies the learning rates, 0 to 1; the first update is number 1. `schedule`
// must be valid (config.h).
double RateFactor(const config::v1::RateSchedule& schedule, int64_t update);
// The same of a number that only the device knows: float32 scalars, up to rounding.
torch::Tensor RateFactor(const config::v1::RateSchedule& schedule, const torch::Tensor& update);
// Whether the factor is always 1.
bool IsConstant(const config::v1::RateSchedule& schedule);

}  // namespace orrery
