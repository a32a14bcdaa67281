// dm_control's utils/rewards.py, as far as the tasks use it.
#pragma once

namespace orrery {

enum class Sigmoid { kGaussian, kLinear, kQuadratic };

// 1 for low ≤ x ≤ high (either may be infinite). Outside it falls with the distance from the nearer bound to `value_at_margin`
// at `margin`; with a margin of 0 it is 0. `value_at_margin` is below 1, and above 0 for kGaussian.
double Tolerance(double x, double low, double high, double margin, Sigmoid sigmoid = Sigmoid::kGaussian,
                 double value_at_margin = 0.1);

}  // namespace orrery
