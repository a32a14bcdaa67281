// Random numbers for the start of an episode.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>

#include "libs/base/random.h"

namespace orrery {

// Draws from an episode's seed. The standard library's distributions differ between implementations; these do not.
class StartRandom {
 public:
  explicit StartRandom(uint64_t seed) : engine_(DeriveSeed(seed, "episode start")) {}
  double Uniform(double low, double high) { return low + (high - low) * (engine_() >> 11) * 0x1p-53; }
  // Standard normal (Box-Muller).
  double Normal() {
    const double radius = std::sqrt(-2 * std::log(1 - Uniform(0, 1)));
    return radius * std::cos(Uniform(0, 2 * M_PI));
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace orrery
