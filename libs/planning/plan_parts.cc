#include "libs/planning/plan_parts.h"

#include <ATen/CPUGeneratorImpl.h>

#include <limits>

namespace orrery {
namespace {

using torch::Tensor;

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
constexpr double kProbabilityFloor = 0.1;  // of a valid choice, times 1 / choices

// A standard normal z becomes a standard Gumbel number through the distribution function of z.
Tensor ToGumbel(const Tensor& z) { return -(-at::special_log_ndtr(z)).clamp_min(1e-30).log(); }

// [N, 1, A]: 1 for a valid choice, else 0. Only where valid_actions is defined.
Tensor Valid(const PlanProblem& problem) { return problem.valid_actions.to(problem.options).unsqueeze(1); }

// Probabilities [N, 1, A].
Tensor UniformChoices(const PlanProblem& problem) {
  const int64_t n = problem.agents, a = problem.action_size;
  if (!problem.valid_actions.defined()) return at::full({n, 1, a}, 1.0 / static_cast<double>(a), problem.options);
  const Tensor valid = Valid(problem);
  return valid / valid.sum(-1, /*keepdim=*/true);
}

// So that no valid choice dies out, and none that is not valid is ever taken.
Tensor WithFloor(const PlanProblem& problem, const Tensor& probabilities) {
  Tensor p = probabilities.clamp_min(kProbabilityFloor / static_cast<double>(problem.action_size));
  if (problem.valid_actions.defined()) p = p * Valid(problem);
  return p / p.sum(-1, /*keepdim=*/true);
}

Tensor PerAgent(const Tensor& x) { return x.view({1, -1, 1, 1}); }

}  // namespace

AgentNormals::AgentNormals(absl::Span<const uint64_t> seeds, torch::Device device) : device_(device) {
  for (size_t i = 0; i < seeds.size(); ++i) {
    generators_.push_back(device.is_cpu() ? at::make_generator<at::CPUGeneratorImpl>()
                                          : at::globalContext().defaultGenerator(device).clone());
  }
  Reseed(seeds);
}

void AgentNormals::Reseed(absl::Span<const uint64_t> seeds) {
  TORCH_CHECK(seeds.size() == generators_.size(), seeds.size(), " seeds for ", generators_.size(), " agents");
  for (size_t i = 0; i < seeds.size(); ++i) generators_[i].set_current_seed(seeds[i]);
}

Tensor AgentNormals::Draw(at::IntArrayRef sizes) {
  std::vector<int64_t> own = sizes.vec();
  own.erase(own.begin() + 1);
  std::vector<Tensor> normals;
  const auto options = at::TensorOptions(at::kFloat).device(device_);
  for (torch::Generator& generator : generators_) normals.push_back(at::randn(own, generator, options));
  return at::stack(normals, 1);
}

Tensor ToUniform(const Tensor& normals) {
  // In float64, so that rounding to float32 hides in which part of a vector operation a number was computed.
  return at::special_ndtr(normals.to(at::kDouble)).to(normals.scalar_type());
}

Tensor OneHot(const Tensor& x) {
  return at::zeros_like(x).scatter_(-1, x.argmax(-1, /*keepdim=*/true), 1);
}

Tensor SampleIndex(const Tensor& weights, const Tensor& normals) {
  return (weights.log() + ToGumbel(normals)).argmax(-1);
}

Tensor SampleOneHot(const Tensor& weights, const Tensor& normals) {
  return OneHot(weights.log() + ToGumbel(normals));
}

Tensor UniformPlans(const PlanProblem& problem, int64_t horizon, int64_t count) {
  const Tensor normals = problem.normals({horizon, problem.agents, count, problem.action_size});
  if (problem.discrete) return SampleOneHot(UniformChoices(problem), normals);
  return ToUniform(normals).mul_(2).sub_(1);
}

PlanDistribution StartDistribution(const PlanProblem& problem, int64_t horizon, double deviation) {
  const int64_t n = problem.agents, a = problem.action_size;
  PlanDistribution start;
  start.mean = problem.discrete ? UniformChoices(problem).expand({horizon, n, 1, a}).contiguous()
                                : at::zeros({horizon, n, 1, a}, problem.options);
  start.std = at::full({horizon, n, 1, a}, deviation, problem.options);
  if (problem.previous_plan.defined()) {
    Tensor previous = problem.previous_plan.to(problem.options).transpose(0, 1).unsqueeze(2).contiguous();
    if (problem.discrete) previous = WithFloor(problem, previous);
    start.mean = at::where(PerAgent(problem.has_previous), previous, start.mean);
  }
  return start;
}

Tensor SamplePlans(const PlanProblem& problem, const PlanDistribution& distribution, const Tensor& normals) {
  Tensor plans = problem.discrete ? SampleOneHot(distribution.mean, normals)
                                  : at::addcmul(distribution.mean, distribution.std, normals).clamp_(-1, 1);
  if (problem.proposals.defined()) plans.narrow(2, 0, problem.proposals.size(2)).copy_(problem.proposals);
  return plans;
}

Tensor NoneNonFinite(const PlanProblem& problem) { return at::zeros({problem.agents}, problem.options.dtype(at::kLong)); }

Tensor MaskNonFinite(const Tensor& returns, Tensor& non_finite) {
  const Tensor bad = returns.isfinite().logical_not();
  non_finite += bad.sum(1);
  return returns.masked_fill(bad, kMinusInfinity);
}

Tensor PickPlans(const Tensor& plans, const Tensor& index) {
  const std::vector<int64_t> sizes = {plans.size(0), plans.size(1), index.size(1), plans.size(3)};
  return plans.gather(2, index.unsqueeze(0).unsqueeze(-1).expand(sizes));
}

Elites TakeElites(const Tensor& plans, const Tensor& returns, int64_t k) {
  const auto [best, index] = returns.topk(k, 1);
  return {PickPlans(plans, index), best, best.isfinite().to(plans.scalar_type())};
}

Tensor MeanReturn(const Elites& elites) {
  return elites.returns.masked_fill(elites.finite == 0, 0).sum(1) / elites.finite.sum(1).clamp_min(1);
}

PlanFit FitPlans(const Tensor& plans, const Tensor& weight) {
  const Tensor w = weight.unsqueeze(0).unsqueeze(-1);  // [1, N, K, 1]
  PlanFit fit;
  fit.mean = (plans * w).sum(2, /*keepdim=*/true);
  fit.variance = ((plans - fit.mean).square() * w).sum(2, /*keepdim=*/true);
  return fit;
}

void Refit(const PlanProblem& problem, const Elites& elites, double momentum, double std_floor, const Tensor& keep,
           PlanDistribution& distribution) {
  const PlanFit fit = FitPlans(elites.plans, elites.finite / elites.finite.sum(1, /*keepdim=*/true).clamp_min(1));
  Tensor mean = problem.discrete ? WithFloor(problem, fit.mean) : fit.mean;
  Tensor deviation = (fit.variance + 1e-6).sqrt_();
  if (momentum > 0) {
    mean = distribution.mean * momentum + mean * (1 - momentum);
    deviation = distribution.std * momentum + deviation * (1 - momentum);
  }
  const Tensor kept = PerAgent(keep);
  distribution.mean = distribution.mean.where(kept, mean);
  distribution.std = distribution.std.where(kept, deviation.clamp_min_(std_floor));
}

BestPlan NoPlanYet(const PlanDistribution& distribution) {
  return {distribution.mean, at::full({distribution.mean.size(1)}, kMinusInfinity, distribution.mean.options())};
}

void KeepBetter(const Tensor& plans, const Tensor& returns, BestPlan& best) {
  const auto [value, index] = returns.max(1);
  best.plan = at::where(PerAgent(value > best.returns), PickPlans(plans, index.unsqueeze(1)), best.plan);
  best.returns = at::maximum(value, best.returns);
}

PlanResult MakeResult(const PlanProblem& problem, const Tensor& mean, const Tensor& deviation, const Tensor& non_finite) {
  PlanResult result;
  result.mean = mean.squeeze(2).transpose(0, 1).contiguous();
  result.std = deviation.squeeze(2).transpose(0, 1).contiguous();
  const Tensor first = result.mean.select(1, 0);
  result.action = problem.discrete ? OneHot(first) : first.contiguous();
  result.non_finite = non_finite;
  if (non_finite.is_cpu()) result.non_finite_plans = non_finite.sum().item<int64_t>();
  return result;
}

}  // namespace orrery
