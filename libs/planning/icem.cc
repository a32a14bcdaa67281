#include "libs/planning/icem.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "libs/planning/plan_parts.h"

namespace orrery {
namespace {

using torch::Tensor;

// Factors [⌊H/2⌋ + 1, 1, 1] of the frequencies 0, 1/H, … that colour noise without changing its variance.
Tensor Gains(int64_t h, double beta, const torch::TensorOptions& options) {
  std::vector<double> gains;
  double power = 0;
  for (int64_t k = 0; k <= h / 2; ++k) {
    gains.push_back(std::pow(static_cast<double>(std::max<int64_t>(k, 1)), -beta / 2));
    const bool alone = k == 0 || 2 * k == h;  // the others stand for a pair of frequencies, k and -k
    power += (alone ? 1 : 2) * gains.back() * gains.back();
  }
  std::vector<Tensor> scaled;  // filled one by one: a copy to a device could not be recorded in a graph
  for (const double gain : gains)
    scaled.push_back(at::full({1, 1, 1}, gain * std::sqrt(static_cast<double>(h) / power), options));
  return at::cat(scaled);
}

// The plans drawn from `plan` and the elites that are kept from before, with their returns.
struct Scored {
  Tensor plans;    // [H, N, J, A]
  Tensor returns;  // [N, J]
};

Scored Extend(Scored scored, const Elites& elites, int64_t kept) {
  scored.plans = at::cat({scored.plans, elites.plans.narrow(2, 0, kept)}, 2);
  scored.returns = at::cat({scored.returns, elites.returns.narrow(1, 0, kept)}, 1);
  return scored;
}

}  // namespace

Tensor ColourNoise(const Tensor& white, double beta) {
  if (beta == 0) return white;
  const int64_t h = white.size(0);
  const Tensor gains = Gains(h, beta, white.options());
  std::vector<Tensor> coloured;
  // Agent by agent, so that the numbers of one do not depend, to the last bit, on how many are transformed together.
  for (const Tensor& own : white.unbind(1)) {
    const Tensor spectrum = at::fft_rfft(own.contiguous(), std::nullopt, 0);
    coloured.push_back(at::fft_irfft(spectrum * gains, h, 0));
  }
  return at::stack(coloured, 1).contiguous();
}

int64_t IcemCandidates(const config::v1::Icem& icem, int64_t i) {
  const double left = icem.candidates() / std::pow(static_cast<double>(icem.candidates_decay()), static_cast<double>(i));
  return std::max<int64_t>(static_cast<int64_t>(left), 2 * icem.elites());
}

PlanResult RunIcem(const config::v1::Icem& icem, const PlanProblem& problem) {
  const int64_t kept = std::llround(static_cast<double>(icem.kept_elites()) * icem.elites());
  PlanDistribution plan = StartDistribution(problem, icem.horizon(), icem.initial_std());
  BestPlan best = NoPlanYet(plan);
  Tensor non_finite = NoneNonFinite(problem);
  Elites elites;
  for (int64_t i = 0; i < icem.iterations(); ++i) {
    const Tensor white = problem.normals({icem.horizon(), problem.agents, IcemCandidates(icem, i), problem.action_size});
    Scored scored;
    scored.plans = SamplePlans(problem, plan, ColourNoise(white, icem.noise_beta()));
    if (i + 1 == icem.iterations()) scored.plans = at::cat({scored.plans, plan.mean.clamp(-1, 1)}, 2);
    scored.returns = MaskNonFinite(problem.objective(scored.plans, i), non_finite);
    if (i > 0 && kept > 0) scored = Extend(std::move(scored), elites, kept);
    elites = TakeElites(scored.plans, scored.returns, icem.elites());
    KeepBetter(elites.plans, elites.returns, best);
    Refit(problem, elites, icem.momentum(), /*std_floor=*/0, elites.finite.sum(1) == 0, plan);
  }
  PlanResult result = MakeResult(problem, plan.mean, plan.std, non_finite);
  result.action = best.plan.select(0, 0).squeeze(1).contiguous();  // [N, A]
  result.predicted_return = best.returns;
  return result;
}

}  // namespace orrery
