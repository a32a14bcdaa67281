#include "libs/planning/captured_plans.h"

#include "libs/planning/testing.h"
#include "libs/world_model/golden.h"

namespace orrery {
namespace {

using torch::Tensor;

// Instead of a search: action = the belief's first two numbers + what the agent draws twice; mean = the previous plan or zeros;
// std = the valid actions or zeros.
struct FakeSearch {
  std::vector<int64_t> agents;  // of each call

  CapturedPlans::Search search() {
    return [this](const WorldModel&, const PlanRequest& request, AgentNormals& normals) {
      const Tensor& deter = request.belief.deter;
      const int64_t n = deter.size(0);
      agents.push_back(n);
      PlanResult plan;
      plan.action = deter.narrow(1, 0, 2) + normals.Draw({1, n, 2})[0] + normals.Draw({1, n, 2})[0];
      const Tensor& previous = request.previous_plan;
      plan.mean = previous.defined() ? previous * request.has_previous.view({n, 1, 1}) : at::zeros({n, 1, 2});
      plan.std = request.valid_actions.defined() ? request.valid_actions.to(at::kFloat) : at::zeros({n, 2});
      plan.predicted_return = request.belief.stoch.sum(1);
      plan.non_finite = at::arange(1, n + 1, at::kLong);
      return plan;
    };
  }
};

class CapturedPlansTest : public ::testing::Test {
 protected:
  const Golden golden_ = LoadGolden("planet_elu");
  FakeSearch fake_;
  CapturedPlans plans_{fake_.search()};
  const LatentState belief_{at::randn({3, 15}), at::randn({3, 7})};
};

TEST_F(CapturedPlansTest, FillsUpToAPowerOfTwoAndAnswersForTheAgentsAlone) {
  const uint64_t seeds[] = {7, 8, 9};
  const PlanResult plan = plans_.Plan(*golden_.model, {belief_, seeds});
  EXPECT_EQ(fake_.agents, std::vector<int64_t>{4});
  ASSERT_EQ(plan.action.sizes(), at::IntArrayRef({3, 2}));
  for (int64_t i = 0; i < 3; ++i) {
    AgentNormals own(std::vector<uint64_t>{seeds[i]}, torch::kCPU);
    const Tensor drawn = own.Draw({1, 1, 2})[0] + own.Draw({1, 1, 2})[0];
    EXPECT_TRUE(Near(plan.action.narrow(0, i, 1), belief_.deter.narrow(0, i, 1).narrow(1, 0, 2) + drawn, 1e-6)) << i;
  }
  EXPECT_TRUE(at::equal(plan.predicted_return, belief_.stoch.sum(1)));
  EXPECT_TRUE(at::equal(plan.non_finite, at::tensor({1, 2, 3}, at::kLong)));
  EXPECT_EQ(plan.non_finite_plans, 6) << "those of the fourth agent do not count";
}

TEST_F(CapturedPlansTest, DrawsFromTheSeedsOfEachCall) {
  const uint64_t seeds[] = {7, 8, 9}, others[] = {7, 8, 10};
  const PlanResult first = plans_.Plan(*golden_.model, {belief_, seeds});
  const PlanResult other = plans_.Plan(*golden_.model, {belief_, others});
  const PlanResult again = plans_.Plan(*golden_.model, {belief_, seeds});
  EXPECT_TRUE(at::equal(first.action, again.action));
  EXPECT_TRUE(at::equal(first.action.narrow(0, 0, 2), other.action.narrow(0, 0, 2)));
  EXPECT_FALSE(at::equal(first.action[2], other.action[2]));
}

TEST_F(CapturedPlansTest, HandsOnPlansAndValidActions) {
  const uint64_t seeds[] = {7, 8, 9};
  const Tensor previous = at::randn({3, 5, 2}), has_previous = at::tensor({1, 0, 1}).to(at::kBool),
               valid = at::tensor({1, 0, 0, 1, 1, 1}).view({3, 2}).to(at::kBool);
  const PlanResult both = plans_.Plan(*golden_.model, {belief_, seeds, previous, has_previous, valid});
  EXPECT_TRUE(at::equal(both.mean[0], previous[0]));
  EXPECT_TRUE(at::equal(both.mean[1], at::zeros({5, 2})));
  EXPECT_TRUE(at::equal(both.std, valid.to(at::kFloat)));
  const PlanResult neither = plans_.Plan(*golden_.model, {belief_, seeds});
  EXPECT_EQ(neither.mean.sizes(), at::IntArrayRef({3, 1, 2}));
  const PlanResult masked = plans_.Plan(*golden_.model, {belief_, seeds, {}, {}, valid});
  EXPECT_TRUE(at::equal(masked.std, valid.to(at::kFloat)));
}

}  // namespace
}  // namespace orrery
