#include "libs/learning/rate_schedule.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

config::v1::RateSchedule Schedule(const std::string& text) {
  const auto experiment = ParseExperiment("learning { rate_schedule { " + text + " } }");
  EXPECT_OK(experiment);
  return experiment->learning().rate_schedule();
}

struct Case {
  std::string schedule;
  std::vector<std::pair<int64_t, double>> factors;  // by update, computed by hand
};

const std::vector<Case>& Cases() {
  static const auto* const cases = new std::vector<Case>{
      {"", {{1, 1}, {2, 1}, {1000000, 1}}},
      {"warm_up_updates: 1", {{1, 1}, {2, 1}}},
      {"warm_up_updates: 4", {{1, 0.25}, {2, 0.5}, {3, 0.75}, {4, 1}, {5, 1}, {999, 1}}},
      // From update 1 to update 5, down to nothing.
      {"shape: LINEAR decay_updates: 4", {{1, 1}, {2, 0.75}, {3, 0.5}, {4, 0.25}, {5, 0}, {6, 0}}},
      // Each of the four falls by (1 - 0.2) / 4.
      {"shape: LINEAR warm_up_updates: 2 decay_updates: 4 final_fraction: 0.2",
       {{1, 0.5}, {2, 1}, {3, 0.8}, {4, 0.6}, {5, 0.4}, {6, 0.2}, {7, 0.2}, {1000, 0.2}}},
      // 0.1 + 0.9 (1 + cos 45°) / 2 with cos 45° = 0.70710678.
      {"shape: COSINE decay_updates: 4 final_fraction: 0.1",
       {{1, 1}, {2, 0.86819805}, {3, 0.55}, {4, 0.23180195}, {5, 0.1}, {100, 0.1}}},
      // cos 60° = 0.5.
      {"shape: COSINE warm_up_updates: 10 decay_updates: 3", {{5, 0.5}, {10, 1}, {11, 0.75}, {12, 0.25}, {13, 0}, {14, 0}}},
      {"shape: LINEAR decay_updates: 1 final_fraction: 1", {{1, 1}, {2, 1}}},
  };
  return *cases;
}

TEST(RateFactor, IsWhatOneComputesByHand) {
  for (const Case& c : Cases()) {
    for (const auto& [update, factor] : c.factors) {
      EXPECT_NEAR(RateFactor(Schedule(c.schedule), update), factor, 1e-8) << c.schedule << " at " << update;
    }
  }
}

TEST(RateFactor, IsTheSameOfANumberOnTheDevice) {
  for (const Case& c : Cases()) {
    for (const auto& [update, factor] : c.factors) {
      const torch::Tensor on_device = RateFactor(Schedule(c.schedule), torch::tensor(static_cast<float>(update)));
      EXPECT_EQ(on_device.scalar_type(), torch::kFloat32);
      EXPECT_EQ(on_device.dim(), 0);
      EXPECT_NEAR(on_device.item<double>(), factor, 1e-6) << c.schedule << " at " << update;
    }
  }
}

TEST(RateFactor, KnowsWhatIsConstant) {
  EXPECT_TRUE(IsConstant(Schedule("")));
  EXPECT_TRUE(IsConstant(Schedule("warm_up_updates: 1 final_fraction: 0.5")));
  EXPECT_FALSE(IsConstant(Schedule("warm_up_updates: 2")));
  EXPECT_FALSE(IsConstant(Schedule("shape: COSINE decay_updates: 5")));
}

}  // namespace
}  // namespace orrery
