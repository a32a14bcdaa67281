// The latent dynamics of WorldModel: transition, prior, posterior, and a whole training sequence.
#include "libs/world_model/layout.h"
#include "libs/world_model/rssm_sequence.h"
#include "libs/world_model/world_model_impl.h"

namespace orrery {
namespace {

using torch::Tensor;

// Whether a row resets some element, by row. On a device the answer would cost a synchronisation: there every row may.
std::vector<bool> RowsWithReset(const Tensor& first) {
  std::vector<bool> rows(first.size(0), true);
  if (!first.is_cpu()) return rows;
  const Tensor any = first.any(1).contiguous();
  const bool* values = any.const_data_ptr<bool>();
  rows.assign(values, values + rows.size());
  return rows;
}

// What the posterior is told of the prediction.
Tensor PredictedFeature(const Predicted& predicted, bool ssm) {
  if (!ssm) return predicted.deter;
  const LatentDistribution& prior = predicted.prior;
  return prior.std.defined() ? at::cat({prior.mean, prior.std}, -1) : prior.mean;
}

LatentDistribution Stack(const std::vector<LatentDistribution>& rows, int64_t dim) {
  std::vector<Tensor> means, stds;
  for (const LatentDistribution& row : rows) {
    means.push_back(row.mean);
    if (row.std.defined()) stds.push_back(row.std);
  }
  return {at::stack(means, dim), stds.empty() ? Tensor() : at::stack(stds, dim)};
}

LatentDistribution Where(const Tensor& condition, const LatentDistribution& yes, const LatentDistribution& no) {
  const Tensor mask = condition.unsqueeze(-1);
  return {at::where(mask, yes.mean, no.mean), yes.std.defined() ? at::where(mask, yes.std, no.std) : Tensor()};
}

LatentDistribution Select(const LatentDistribution& d, int64_t index) {
  return {d.mean[index], d.std.defined() ? d.std[index] : Tensor()};
}

LatentDistribution AsComponent(const LatentDistribution& d) {
  return {d.mean.unsqueeze(0), d.std.defined() ? d.std.unsqueeze(0) : Tensor()};
}

}  // namespace

LatentDistribution WorldModel::Impl::PriorOf(const Tensor& h) const {
  return latents.FromOutputs(prior_out(prior_hidden.Hidden(activation, h)));
}

Tensor WorldModel::Impl::Gru(const Tensor& x, const Tensor& h) const {
  if (!gru_norm_weight.defined()) return at::gru_cell(x, h, gru_weight_ih, gru_weight_hh, gru_bias_ih, gru_bias_hh);
  const Tensor sum = at::linear(x, gru_weight_ih, gru_bias_ih) + at::linear(h, gru_weight_hh, gru_bias_hh);
  const auto gates = at::layer_norm(sum, {3 * deter}, gru_norm_weight, gru_norm_bias, /*eps=*/1e-3).chunk(3, -1);
  const Tensor r = at::sigmoid(gates[0]), z = at::sigmoid(gates[1] + 1), n = at::tanh(r * gates[2]);
  return at::lerp(n, h, z);
}

Predicted WorldModel::Impl::PredictFrom(const Tensor& action_part, const LatentState& state) const {
  const Tensor x = transition().Finish(activation, at::addmm(action_part, state.stoch, state_weight().t()));
  if (ssm()) return {state.deter, latents.FromOutputs(prior_out(x))};
  Predicted predicted;
  predicted.deter = Gru(x, state.deter);
  predicted.prior = PriorOf(predicted.deter);
  return predicted;
}

Tensor WorldModel::Impl::EmbedPart(const Expert& expert, const Tensor& embed) const {
  const int64_t predicted = expert.hidden.weight.size(1) - expert.size;
  return at::linear(embed.narrow(-1, expert.begin, expert.size), expert.hidden.weight.slice(1, predicted),
                    expert.hidden.bias);
}

LatentDistribution WorldModel::Impl::ExpertFrom(const Expert& expert, const Tensor& embed_part,
                                                const Predicted& predicted) const {
  const Tensor feature = PredictedFeature(predicted, ssm());
  const Tensor weight = expert.hidden.weight.slice(1, 0, feature.size(-1));
  const Tensor hidden = expert.hidden.Finish(activation, at::addmm(embed_part, feature, weight.t()));
  return latents.FromOutputs(expert.out(hidden));
}

LatentDistribution WorldModel::Impl::Experts(const std::vector<Tensor>& embed_parts, const Predicted& predicted) const {
  std::vector<LatentDistribution> all;
  for (size_t i = 0; i < experts.size(); ++i) all.push_back(ExpertFrom(experts[i], embed_parts[i], predicted));
  return Stack(all, 0);
}

Mixture WorldModel::Impl::PosteriorMixture(const std::vector<Tensor>& embed_parts, const Tensor& available,
                                           const Predicted& predicted) const {
  const LatentDistribution all = Experts(embed_parts, predicted);
  const int64_t n = all.mean.size(1);
  if (HasExperts(config)) {
    const Tensor there = available.defined()
                             ? available
                             : at::ones({static_cast<int64_t>(experts.size()), n}, options().dtype(at::kBool));
    return JoinExperts(config.posterior(), all, there, predicted.prior);
  }
  LatentDistribution joint = Select(all, 0);
  if (available.defined()) joint = Where(available.any(0), joint, predicted.prior);
  return {AsComponent(joint), at::ones({1, n}, joint.mean.options().requires_grad(false))};
}

LatentDistribution WorldModel::Posterior(const Predicted& predicted, const Embedding& embedding) const {
  const Impl& m = *impl_;
  std::vector<Tensor> parts;
  for (const Expert& expert : m.experts) parts.push_back(m.EmbedPart(expert, embedding.value));
  const auto kind = m.config.posterior();
  if (kind != config::v1::Model::MOE && kind != config::v1::Model::MOPOE)
    return Select(m.PosteriorMixture(parts, embedding.available, predicted).components, 0);
  const LatentDistribution all = m.Experts(parts, predicted);
  const Tensor there = embedding.available.defined()
                           ? embedding.available
                           : at::ones({all.mean.size(0), all.mean.size(1)}, m.options().dtype(at::kBool));
  return ProductOfExperts(all, there, predicted.prior);
}

bool WorldModel::Impl::can_fuse() const {
  return !ssm() && !latents.categorical() && !config.layer_norm() && !HasExperts(config);
}

Observed WorldModel::Impl::Observe(const Tensor& action_part, const Embedding& embedding, const Tensor& first,
                                   const Tensor& keep, const LossNoise& noise) const {
  if (can_fuse() && !embedding.available.defined())
    return ObserveFused(action_part, embedding.value, first, keep,
                        latents.deterministic() ? at::zeros_like(noise.posterior) : noise.posterior);
  return ObserveStepByStep(action_part, embedding, keep, noise);
}

Observed WorldModel::Impl::ObserveFused(const Tensor& action_part, const Tensor& embed, const Tensor& first,
                                        const Tensor& keep, const Tensor& noise) const {
  const int64_t t = keep.size(0), b = keep.size(1);
  const Expert& posterior = experts[0];
  const RssmSequenceOutputs sequence = RunRssmSequence({.action_part = action_part,
                                                        .embed_part = EmbedPart(posterior, embed).view({t, b, -1}),
                                                        .state_weight = state_weight(),
                                                        .weight_ih = gru_weight_ih,
                                                        .bias_ih = gru_bias_ih,
                                                        .weight_hh = gru_weight_hh,
                                                        .bias_hh = gru_bias_hh,
                                                        .deter_weight = posterior.hidden.weight.slice(1, 0, deter),
                                                        .out_weight = posterior.out.weight,
                                                        .out_bias = posterior.out.bias,
                                                        .noise = noise,
                                                        .keep = keep,
                                                        .resets = RowsWithReset(first),
                                                        .activation = activation,
                                                        .min_std = min_std});
  const LatentDistribution prior = PriorOf(sequence.deter), q{sequence.post_mean, sequence.post_std};
  return {sequence.deter, sequence.stoch, prior, {AsComponent(q), at::ones({1, t, b}, options())}, q};
}

Observed WorldModel::Impl::ObserveStepByStep(const Tensor& action_part, const Embedding& embedding, const Tensor& keep,
                                             const LossNoise& noise) const {
  const int64_t t_size = keep.size(0), b = keep.size(1);
  std::vector<std::vector<Tensor>> parts;  // [expert][row] [B, U]
  for (const Expert& expert : experts) parts.push_back(EmbedPart(expert, embedding.value).view({t_size, b, -1}).unbind());
  Tensor available;
  if (embedding.available.defined()) available = embedding.available.view({-1, t_size, b});
  LatentState state{at::zeros({b, deter}, options()), at::zeros({b, stoch}, options())};
  std::vector<Tensor> deters, stochs, weights;
  std::vector<LatentDistribution> priors, components, drawn;
  for (int64_t t = 0; t < t_size; ++t) {
    const Predicted predicted = PredictFrom(action_part[t], {state.deter * keep[t], state.stoch * keep[t]});
    std::vector<Tensor> row;
    for (const auto& part : parts) row.push_back(part[t]);
    const Mixture q = PosteriorMixture(row, available.defined() ? available.select(1, t) : available, predicted);
    const bool one = q.weight.size(0) == 1;
    drawn.push_back(one ? Select(q.components, 0) : DrawComponent(q, noise.component[t]));
    state = {predicted.deter, latents.Sample(drawn.back(), noise.posterior[t])};
    deters.push_back(state.deter);
    stochs.push_back(state.stoch);
    weights.push_back(q.weight);
    priors.push_back(predicted.prior);
    components.push_back(q.components);
  }
  return {at::stack(deters), at::stack(stochs), Stack(priors, 0), {Stack(components, 1), at::stack(weights, 1)},
          Stack(drawn, 0)};
}

}  // namespace orrery
