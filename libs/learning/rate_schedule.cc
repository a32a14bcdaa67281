#include "libs/learning/rate_schedule.h"

#include <algorithm>
#include <cmath>

namespace orrery {
namespace {

using config::v1::RateSchedule;

// The first update at full rates.
int64_t FirstFull(const RateSchedule& schedule) { return std::max<int64_t>(1, schedule.warm_up_updates()); }

}  // namespace

double RateFactor(const RateSchedule& schedule, int64_t update) {
  const auto number = static_cast<double>(update), full = static_cast<double>(FirstFull(schedule));
  if (number < full) return number / full;
  if (schedule.shape() == RateSchedule::CONSTANT) return 1;
  const double passed = std::min(1.0, (number - full) / static_cast<double>(schedule.decay_updates()));
  // 1 at first, 0 at last.
  const double height = schedule.shape() == RateSchedule::LINEAR ? 1 - passed : (1 + std::cos(M_PI * passed)) / 2;
  return height + (1 - height) * schedule.final_fraction();
}

torch::Tensor RateFactor(const RateSchedule& schedule, const torch::Tensor& update) {
  const auto full = static_cast<double>(FirstFull(schedule));
  const torch::Tensor rising = update / full;
  if (schedule.shape() == RateSchedule::CONSTANT) return rising.clamp_max(1);
  const torch::Tensor passed = ((update - full) / static_cast<double>(schedule.decay_updates())).clamp(0, 1);
  const torch::Tensor height = schedule.shape() == RateSchedule::LINEAR ? 1 - passed : ((passed * M_PI).cos() + 1) / 2;
  return at::where(update < full, rising, height + (1 - height) * schedule.final_fraction());
}

bool IsConstant(const RateSchedule& schedule) {
  return schedule.shape() == RateSchedule::CONSTANT && FirstFull(schedule) == 1;
}

}  // namespace orrery
