// Seeds: one seed in the configuration, independent streams from it.
#pragma once

#include <cstdint>

#include "absl/strings/string_view.h"

namespace orrery {

// A well mixed 64-bit seed for stream `index` of purpose `name`, from a base seed. Pure: the same on every machine.
// (SplitMix64 over the FNV-1a hash of the name.)
uint64_t DeriveSeed(uint64_t base, absl::string_view name, uint64_t index = 0);

}  // namespace orrery
