#include "libs/world_model/imagine.h"

namespace orrery {

using torch::Tensor;

Imagined Imagine(const WorldModel& model, const Batch& batch, int64_t context, const Tensor& noise) {
  torch::NoGradGuard no_grad;
  const int64_t t_size = batch.action.size(0), b = batch.action.size(1);
  TensorMap seen;
  for (const auto& [name, x] : batch.observations) seen.emplace(name, x.slice(0, 0, context).flatten(0, 1));
  const Embedding embedding = model.Encode(seen);
  const Tensor keep = batch.is_first.eq(0).to(at::kFloat).unsqueeze(-1);

  LatentState state = model.InitialState(b);
  std::vector<Tensor> deter, stoch;
  for (int64_t t = 0; t < t_size; ++t) {
    const Predicted predicted = model.Predict({state.deter * keep[t], state.stoch * keep[t]}, batch.action[t] * keep[t]);
    const auto rows = [&](const Tensor& x, int64_t dim) { return x.defined() ? x.slice(dim, t * b, (t + 1) * b) : x; };
    const LatentDistribution belief =
        t < context ? model.Posterior(predicted, {rows(embedding.value, 0), rows(embedding.available, 1)}) : predicted.prior;
    state = {predicted.deter, model.latents().Sample(belief, noise[t])};
    deter.push_back(state.deter);
    stoch.push_back(state.stoch);
  }
  const LatentState all{at::cat(deter), at::cat(stoch)};
  Imagined imagined;
  for (const auto& [name, x] : model.Decode(all)) imagined.recon.emplace(name, x.unflatten(0, at::IntArrayRef{t_size, b}));
  imagined.reward_mean = model.Reward(all).view({t_size, b});
  return imagined;
}

}  // namespace orrery
