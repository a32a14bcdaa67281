// Problems for tests of planning algorithms that need no model.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libs/base/status_matchers.h"
#include "libs/config/config.h"
#include "libs/planning/plan_parts.h"
#include "libs/planning/plan_problem.h"

namespace orrery {

inline config::v1::Planner ParsePlannerOrDie(const std::string& text) {
  auto planner = ParsePlanner(text);
  EXPECT_OK(planner);
  const config::v1::Planner parsed = planner.value_or(config::v1::Planner());
  EXPECT_OK(Validate(parsed));
  return parsed;
}

// One agent per seed; plans are scored by a plain function of them: returns [N, J] of plans [H, N, J, A].
template <typename Problem = PlanProblem>
Problem Scored(const std::vector<uint64_t>& seeds, int64_t action_size,
               std::function<torch::Tensor(const torch::Tensor&)> score) {
  Problem problem;
  problem.agents = static_cast<int64_t>(seeds.size());
  problem.action_size = action_size;
  const auto normals = std::make_shared<AgentNormals>(seeds, torch::kCPU);
  problem.normals = [normals](at::IntArrayRef sizes) { return normals->Draw(sizes); };
  problem.objective = [function = std::move(score)](const torch::Tensor& plans, int64_t) { return function(plans); };
  return problem;
}

// -|plan - target|² for a target [H, A].
inline std::function<torch::Tensor(const torch::Tensor&)> Towards(const torch::Tensor& target) {
  return [wanted = target.unsqueeze(1).unsqueeze(1)](const torch::Tensor& plans) {
    return -(plans - wanted).square().sum(at::IntArrayRef{0, 3});
  };
}

// Steps at which one-hot plans take the choice [H] that is right.
inline std::function<torch::Tensor(const torch::Tensor&)> RightChoices(const torch::Tensor& right) {
  return [right](const torch::Tensor& plans) {
    EXPECT_TRUE(at::equal(plans.sum(-1), at::ones_like(plans.select(-1, 0)))) << "not one-hot";
    return (plans.argmax(-1) == right.view({-1, 1, 1})).to(at::kFloat).sum(0);
  };
}

// The sum of all numbers, but nothing finite where the first is above 0.
inline torch::Tensor SumBelowZero(const torch::Tensor& plans) {
  const torch::Tensor x = plans.select(3, 0).select(0, 0);
  return plans.sum(at::IntArrayRef{0, 3})
      .masked_fill(x > 0, std::numeric_limits<float>::infinity())
      .masked_fill(x > 0.5, std::nanf(""));
}

// Never finite.
inline torch::Tensor NotANumber(const torch::Tensor& plans) {
  return at::full({plans.size(1), plans.size(2)}, std::nanf(""));
}

// A batch of two agents answers as two batches of one, to the last bit. `run` plans for the agents with these seeds.
// Returns the batch's answer.
inline PlanResult ExpectBatchEqualsSingles(const std::function<PlanResult(const std::vector<uint64_t>& seeds)>& run) {
  const std::vector<uint64_t> seeds = {11, 12};
  const PlanResult both = run(seeds);
  for (size_t k = 0; k < seeds.size(); ++k) {
    const PlanResult one = run({seeds[k]});
    const auto i = static_cast<int64_t>(k);
    EXPECT_TRUE(at::equal(both.action[i], one.action[0])) << "agent " << i;
    EXPECT_TRUE(at::equal(both.mean[i], one.mean[0])) << "agent " << i;
    EXPECT_TRUE(at::equal(both.std[i], one.std[0])) << "agent " << i;
    EXPECT_TRUE(at::equal(both.predicted_return[i], one.predicted_return[0])) << "agent " << i;
  }
  return both;
}

}  // namespace orrery
