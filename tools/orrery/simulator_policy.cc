#include "tools/orrery/simulator_policy.h"

#include <ATen/CPUGeneratorImpl.h>

#include <atomic>
#include <limits>
#include <utility>

#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/planning/cem.h"

namespace orrery {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// Sum of the rewards of a plan of `horizon` actions of `size` numbers, which begin `stride` numbers apart.
absl::StatusOr<double> PlayPlan(Lookahead& lookahead, const float* actions, int64_t horizon, int64_t stride,
                                int64_t size) {
  RETURN_IF_ERROR(lookahead.Restart());
  double sum = 0;
  for (int64_t h = 0; h < horizon; ++h) {
    ASSIGN_OR_RETURN(const double reward,
                     lookahead.Step(absl::MakeConstSpan(actions + h * stride, static_cast<size_t>(size))));
    sum += reward;
  }
  return sum;
}

}  // namespace

absl::StatusOr<std::unique_ptr<SimulatorPolicy>> SimulatorPolicy::Create(const Environment& environment,
                                                                         const config::v1::Cem& cem, int threads) {
  config::v1::Planner planner;
  *planner.mutable_cem() = cem;
  RETURN_IF_ERROR(Validate(planner));
  std::vector<std::unique_ptr<Lookahead>> lookaheads;
  for (int i = 0; i < threads; ++i) {
    ASSIGN_OR_RETURN(std::unique_ptr<Lookahead> lookahead, environment.MakeLookahead());
    lookaheads.push_back(std::move(lookahead));
  }
  return std::unique_ptr<SimulatorPolicy>(new SimulatorPolicy(environment.spec().action, cem, std::move(lookaheads)));
}

SimulatorPolicy::SimulatorPolicy(ActionSpec spec, const config::v1::Cem& cem,
                                 std::vector<std::unique_ptr<Lookahead>> lookaheads)
    : spec_(spec),
      cem_(cem),
      lookaheads_(std::move(lookaheads)),
      workers_(static_cast<int>(lookaheads_.size())) {}

void SimulatorPolicy::Begin(uint64_t seed) {
  seed_ = seed;
  row_ = 0;
}

absl::StatusOr<std::vector<float>> SimulatorPolicy::Act(const ArrayMap&) {
  torch::NoGradGuard no_grad;
  return CatchExceptions("planning", [&]() -> absl::StatusOr<std::vector<float>> {
    torch::Generator generator = at::make_generator<at::CPUGeneratorImpl>(DeriveSeed(seed_, "act", row_));
    absl::Status failure;
    CemProblem problem;
    problem.action_size = spec_.size;
    problem.discrete = spec_.discrete;
    problem.draw = [&](int64_t) {
      return at::randn({cem_.horizon(), 1, cem_.candidates(), spec_.size}, generator, at::kFloat);
    };
    problem.objective = [&](const torch::Tensor& plans, int64_t) { return Returns(plans, failure); };
    const PlanResult plan = RunCem(cem_, problem);
    RETURN_IF_ERROR(failure);
    row_ += 1;
    const torch::Tensor action = plan.action.contiguous();
    return std::vector<float>(action.const_data_ptr<float>(), action.const_data_ptr<float>() + action.numel());
  });
}

torch::Tensor SimulatorPolicy::Returns(const torch::Tensor& plans, absl::Status& failure) {
  const torch::Tensor rows = plans.contiguous();
  const int64_t horizon = rows.size(0), candidates = rows.size(2), size = rows.size(3);
  torch::Tensor returns = at::zeros({1, candidates}, at::kFloat);
  if (!failure.ok()) return returns;
  const float* actions = rows.const_data_ptr<float>();
  float* out = returns.mutable_data_ptr<float>();
  std::vector<absl::Status> failures(lookaheads_.size());
  std::atomic<int64_t> next = 0;
  workers_.Run(static_cast<int64_t>(lookaheads_.size()), [&](int64_t i) {
    for (int64_t j; (j = next.fetch_add(1)) < candidates;) {
      absl::StatusOr<double> value = PlayPlan(*lookaheads_[i], actions + j * size, horizon, candidates * size, size);
      if (absl::IsOutOfRange(value.status())) value = kMinusInfinity;
      if (!value.ok()) {
        failures[i] = value.status();
        return;
      }
      out[j] = static_cast<float>(*value);
    }
  });
  for (const absl::Status& status : failures) failure.Update(status);
  return returns;
}

}  // namespace orrery
