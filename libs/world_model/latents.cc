#include "libs/world_model/latents.h"

#include "libs/world_model/layout.h"

namespace orrery {

using torch::Tensor;

Latents::Latents(const config::v1::Model& model)
    : groups_(model.has_categorical() ? model.categorical().groups() : 0),
      classes_(model.has_categorical() ? model.categorical().classes() : 0),
      size_(StochasticSize(model)),
      deterministic_(model.latent() == config::v1::Model::RNN),
      min_std_(model.min_std()),
      uniform_mix_(model.categorical().uniform_mix()) {}

LatentDistribution Latents::FromOutputs(const Tensor& outputs) const {
  if (!categorical()) {
    const auto parts = outputs.chunk(2, -1);
    return {parts[0], at::softplus(parts[1]) + min_std_};
  }
  const Tensor p = at::softmax(Grouped(outputs), -1);
  return {(p * (1 - uniform_mix_) + uniform_mix_ / static_cast<double>(classes_)).flatten(-2), {}};
}

Tensor Latents::Sample(const LatentDistribution& d, const Tensor& noise) const {
  if (deterministic_) return d.mean;
  if (!categorical()) return at::addcmul(d.mean, d.std, noise);
  const Tensor p = Grouped(d.mean);
  const Tensor best = (p.detach().log() + ToGumbel(Grouped(noise))).argmax(-1, /*keepdim=*/true);
  const Tensor one_hot = at::zeros_like(p).scatter_(-1, best, 1);
  return (one_hot + (p - p.detach())).flatten(-2);
}

Tensor Latents::Mode(const LatentDistribution& d) const {
  if (!categorical()) return d.mean;
  const Tensor p = Grouped(d.mean);
  return at::zeros_like(p).scatter_(-1, p.argmax(-1, /*keepdim=*/true), 1).flatten(-2);
}

Tensor Latents::Divergence(const LatentDistribution& q, const LatentDistribution& p) const {
  if (deterministic_) return at::zeros(q.mean.sizes().slice(0, q.mean.dim() - 1), q.mean.options());
  if (categorical()) return (q.mean * (q.mean.log() - p.mean.log())).sum(-1);
  const Tensor ratio = (q.std / p.std).square();
  const Tensor distance = ((q.mean - p.mean) / p.std).square();
  return (ratio + distance - 1 - ratio.log()).sum(-1) * 0.5;
}

Tensor Latents::DivergenceFromStandard(const LatentDistribution& q) const {
  const Tensor zero = at::zeros_like(q.mean);
  if (categorical()) return Divergence(q, {at::full_like(q.mean, 1.0 / static_cast<double>(classes_)), {}});
  return Divergence(q, {zero, at::ones_like(q.std)});
}

Tensor ToGumbel(const Tensor& z) { return -(-at::special_log_ndtr(z)).clamp_min(1e-30).log(); }

}  // namespace orrery
