#include "libs/envs/rewards.h"

#include <cmath>

namespace orrery {

double Tolerance(double x, double low, double high, double margin, Sigmoid sigmoid, double value_at_margin) {
  if (low <= x && x <= high) return 1;
  if (margin == 0) return 0;
  const double distance = (x < low ? low - x : x - high) / margin;
  switch (sigmoid) {
    case Sigmoid::kGaussian: {
      const double scaled = distance * std::sqrt(-2 * std::log(value_at_margin));
      return std::exp(-0.5 * scaled * scaled);
    }
    case Sigmoid::kLinear: {
      const double scaled = distance * (1 - value_at_margin);
      return scaled < 1 ? 1 - scaled : 0;
    }
    case Sigmoid::kQuadratic: {
      const double scaled = distance * std::sqrt(1 - value_at_margin);
      return scaled < 1 ? 1 - scaled * scaled : 0;
    }
  }
  return 0;
}

}  // namespace orrery
