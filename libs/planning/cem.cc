#include "libs/planning/cem.h"

#include <limits>

namespace orrery {
namespace {

using torch::Tensor;

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// A standard normal z becomes a standard Gumbel number through the distribution function of z.
Tensor ToGumbel(const Tensor& z) { return -(-at::special_log_ndtr(z)).clamp_min(1e-30).log(); }

Tensor OneHot(const Tensor& x) {
  return at::zeros_like(x).scatter_(-1, x.argmax(-1, /*keepdim=*/true), 1);
}

// Mean and population variance over the elites that count: weight [N, K], elites [H, N, K, A].
void Refit(const Tensor& elites, const Tensor& weight, Tensor& mean, Tensor& variance) {
  const Tensor w = (weight / weight.sum(1, /*keepdim=*/true).clamp_min(1)).unsqueeze(0).unsqueeze(-1);  // [1, N, K, 1]
  mean = (elites * w).sum(2, /*keepdim=*/true);
  variance = ((elites - mean).square() * w).sum(2, /*keepdim=*/true);
}

}  // namespace

PlanResult RunCem(const config::v1::Cem& cem, const CemProblem& problem) {
  const int64_t h = cem.horizon(), n = problem.agents, a = problem.action_size, k = cem.elites();
  // [H, N, 1, A]; for discrete actions the mean holds probabilities.
  Tensor mean = at::full({h, n, 1, a}, problem.discrete ? 1.0 / static_cast<double>(a) : 0.0, problem.options);
  Tensor std = at::ones({h, n, 1, a}, problem.options);
  Tensor stuck = at::zeros({n}, problem.options.dtype(at::kBool));
  Tensor bad = at::zeros({}, problem.options.dtype(at::kLong));
  PlanResult result;
  for (int64_t i = 0; i < cem.iterations(); ++i) {
    const Tensor noise = problem.draw(i);
    const Tensor plans = problem.discrete ? OneHot(mean.log() + ToGumbel(noise))
                                          : at::addcmul(mean, std, noise).clamp_(-1, 1);
    Tensor returns = problem.objective(plans, i);
    const Tensor finite = returns.isfinite();
    bad += finite.logical_not().sum();
    returns = returns.where(finite, at::scalar_tensor(kMinusInfinity, returns.options()));

    const auto [best, index] = returns.topk(k, 1);
    const Tensor weight = best.isfinite().to(mean.scalar_type());
    const Tensor elites = plans.gather(2, index.view({1, n, k, 1}).expand({h, n, k, a}));
    Tensor new_mean, variance;
    Refit(elites, weight, new_mean, variance);
    if (problem.discrete) {
      new_mean.clamp_min_(0.1 / static_cast<double>(a));
      new_mean.div_(new_mean.sum(-1, /*keepdim=*/true));
    }
    stuck.logical_or_(weight.sum(1) == 0);
    const Tensor keep = stuck.view({1, n, 1, 1});
    mean = mean.where(keep, new_mean);
    std = std.where(keep, variance.add_(1e-6).sqrt_().clamp_min_(cem.std_floor()));
    const Tensor elite_return = best.where(weight != 0, at::zeros_like(best)).sum(1) / weight.sum(1).clamp_min(1);
    result.predicted_return = elite_return.masked_fill(stuck, kMinusInfinity);
  }
  result.mean = mean.squeeze(2).transpose(0, 1).contiguous();
  result.std = std.squeeze(2).transpose(0, 1).contiguous();
  const Tensor first = result.mean.select(1, 0);
  result.action = problem.discrete ? OneHot(first) : first.contiguous();
  result.non_finite_plans = bad.item<int64_t>();
  return result;
}

}  // namespace orrery
