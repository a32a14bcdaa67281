#include "libs/world_model/experts.h"

namespace orrery {
namespace {

using torch::Tensor;

// Product over the modalities of `subset` that are there. `found` [N]: there are some.
LatentDistribution Product(const LatentDistribution& experts, const Tensor& available, const std::vector<int64_t>& subset,
                           Tensor& found) {
  Tensor precision, weighted;
  for (const int64_t m : subset) {
    const Tensor there = available[m].to(experts.std.scalar_type()).unsqueeze(-1);
    const Tensor p = there / experts.std[m].square();
    precision = precision.defined() ? precision + p : p;
    weighted = weighted.defined() ? weighted + p * experts.mean[m] : p * experts.mean[m];
    found = found.defined() ? found.logical_or(available[m]) : available[m];
  }
  const Tensor missing = found.logical_not().to(precision.scalar_type()).unsqueeze(-1);
  const Tensor variance = (precision + missing).reciprocal();  // 1 where nothing is there
  return {variance * weighted, variance.sqrt()};
}

std::vector<int64_t> Members(unsigned subset) {
  std::vector<int64_t> members;
  for (int64_t m = 0; subset >> m != 0; ++m)
    if (subset >> m & 1) members.push_back(m);
  return members;
}

// `prior` where `missing` [N].
LatentDistribution OrPrior(const LatentDistribution& d, const LatentDistribution& prior, const Tensor& missing) {
  const Tensor mask = missing.unsqueeze(-1);
  return {at::where(mask, prior.mean, d.mean), at::where(mask, prior.std, d.std)};
}

// Mean of the components' means; deviation sqrt(Σ σ²) / K.
LatentDistribution Average(const Mixture& mixture) {
  const Tensor w = mixture.weight.unsqueeze(-1);
  return {(mixture.components.mean * w).sum(0), (mixture.components.std * w).square().sum(0).sqrt()};
}

}  // namespace

std::vector<unsigned> Subsets(config::v1::Model::Posterior posterior, int modalities) {
  std::vector<unsigned> subsets;
  const unsigned all = (1u << modalities) - 1;
  if (posterior == config::v1::Model::POE || posterior == config::v1::Model::JOINT) return {all};
  for (unsigned s = 1; s <= all; ++s) {
    if (posterior != config::v1::Model::MOE || (s & (s - 1)) == 0) subsets.push_back(s);
  }
  return subsets;
}

Mixture JoinExperts(config::v1::Model::Posterior posterior, const LatentDistribution& experts, const Tensor& available,
                    const LatentDistribution& prior) {
  const Tensor missing = available.any(0).logical_not();
  if (posterior == config::v1::Model::POE) {
    const LatentDistribution product = ProductOfExperts(experts, available, prior);
    return {{product.mean.unsqueeze(0), product.std.unsqueeze(0)}, at::ones_like(product.mean.select(-1, 0)).unsqueeze(0)};
  }
  std::vector<Tensor> means, stds, counts;
  for (const unsigned subset : Subsets(posterior, static_cast<int>(available.size(0)))) {
    const std::vector<int64_t> members = Members(subset);
    Tensor some, whole;
    const LatentDistribution product = Product(experts, available, members, some);
    for (const int64_t m : members) whole = whole.defined() ? whole.logical_and(available[m]) : available[m];
    means.push_back(product.mean);
    stds.push_back(product.std);
    counts.push_back(whole);
  }
  // Elements with nothing: the prior, as their first component.
  const LatentDistribution first = OrPrior({means[0], stds[0]}, prior, missing);
  means[0] = first.mean;
  stds[0] = first.std;
  counts[0] = counts[0].logical_or(missing);
  const Tensor counted = at::stack(counts).to(experts.mean.scalar_type());
  Mixture mixture{{at::stack(means), at::stack(stds)}, counted / counted.sum(0, /*keepdim=*/true)};
  if (posterior != config::v1::Model::MOPOE_AVERAGED) return mixture;
  const LatentDistribution averaged = Average(mixture);
  return {{averaged.mean.unsqueeze(0), averaged.std.unsqueeze(0)}, at::ones_like(missing, counted.options()).unsqueeze(0)};
}

LatentDistribution ProductOfExperts(const LatentDistribution& experts, const Tensor& available,
                                    const LatentDistribution& prior) {
  std::vector<int64_t> all;
  for (int64_t m = 0; m < available.size(0); ++m) all.push_back(m);
  Tensor found;
  const LatentDistribution product = Product(experts, available, all, found);
  return OrPrior(product, prior, found.logical_not());
}

LatentDistribution DrawComponent(const Mixture& mixture, const Tensor& uniform) {
  if (mixture.weight.size(0) == 1) return {mixture.components.mean[0], mixture.components.std[0]};
  // The first component at which the weights so far exceed the number: one with a weight, as the number is below 1.
  const Tensor passed = mixture.weight.cumsum(0).le(uniform.unsqueeze(0)).sum(0);
  const Tensor last = mixture.weight.gt(0).to(at::kLong).mul(at::arange(mixture.weight.size(0), passed.options()).unsqueeze(-1)).amax(0);
  const Tensor index = at::minimum(passed, last).view({1, -1, 1}).expand({1, -1, mixture.components.mean.size(-1)});
  return {mixture.components.mean.gather(0, index).squeeze(0), mixture.components.std.gather(0, index).squeeze(0)};
}

}  // namespace orrery
