// dm_control's utils/rewards.py, as far as the tasks use it.
#pragma once

namespace orrery {

enum class Sigmoid { kGaussian, kQuadratic };

// 1 for low ≤ x ≤ high; outside it falls with the distance to `value_at_margin` at `margin` (> 0) from the nearer bound.
double Tolerance(double x, double low, double high, double margin, Sigmoid sigmoid = Sigmoid::kGaussian,
                 double value_at_margin = 0.1);

}  // namespace orrery
