// The objective of WorldModel (docs/model.md).
#include <algorithm>

#include "libs/world_model/heads.h"
#include "libs/world_model/layout.h"
#include "libs/world_model/world_model_impl.h"

namespace orrery {
namespace {

using config::v1::Overshooting;
using torch::Tensor;

// Mean of `rows` [N] over those that count.
Tensor MaskedMean(const Tensor& rows, const Tensor& counts) {
  if (!counts.defined()) return rows.mean();
  const Tensor weight = counts.to(rows.scalar_type());
  return rows.dot(weight) / weight.sum().clamp_min(1);
}

const Tensor& Find(const TensorMap& map, const std::string& name) {
  static const Tensor none;
  const auto it = map.find(name);
  return it == map.end() ? none : it->second;
}

LatentDistribution Slice(const LatentDistribution& d, int64_t dim, int64_t begin) {
  return {d.mean.slice(dim, begin), d.std.defined() ? d.std.slice(dim, begin) : Tensor()};
}

}  // namespace

// What the posterior may see and the loss counts: [T·B] by modality; no entry: everything.
TensorMap WorldModel::Impl::Available(const Batch& batch, const Tensor& dropout) const {
  TensorMap available;
  for (size_t i = 0; i < modalities.size(); ++i) {
    Tensor there = Find(batch.available, modalities[i].name);
    if (there.defined()) there = there.ne(0);
    if (dropout.defined()) {
      const Tensor kept = dropout.select(-1, static_cast<int64_t>(i)).ge(config.modality_dropout());
      there = there.defined() ? there.logical_and(kept) : kept;
    }
    if (there.defined()) available.emplace(modalities[i].name, there.reshape({-1}));
  }
  return available;
}

Tensor WorldModel::Impl::ObservationLoss(const std::map<std::string, Likelihood>& recon, const TensorMap& flat,
                                         const TensorMap& available) const {
  Tensor loss;
  for (const ModalityNet& net : modalities) {
    const Tensor& seen = flat.at(net.name);
    const Tensor target = net.symlog ? Symlog(seen) : seen;
    const Likelihood& predicted = recon.at(net.name);
    const Tensor& counts = Find(available, net.name);
    Tensor term;
    if (predicted.std.defined()) {
      const Tensor rows = GaussianNll(predicted.mean, predicted.std, target).flatten(1).sum(1);
      term = net.scale * MaskedMean(rows, counts);
    } else if (counts.defined()) {
      term = net.scale * MaskedMean(0.5 * (predicted.mean - target).square().flatten(1).sum(1), counts);
    } else {
      term = at::mse_loss(predicted.mean, target, at::Reduction::Sum) * (0.5 * net.scale / static_cast<double>(target.size(0)));
    }
    loss = loss.defined() ? loss + term : term;
  }
  return loss;
}

Tensor WorldModel::Impl::RewardLoss(const RewardPrediction& predicted, const Tensor& given) const {
  const Tensor target = TransformReward(config.reward().transform(), given);
  if (predicted.logits.defined()) return TwoHotNll(predicted.logits, target);
  if (predicted.std.defined()) return GaussianNll(predicted.mean, predicted.std, target);
  return 0.5 * (predicted.mean - target).square();
}

// The rule is applied to each component ([K, N], weight [K, N]), then averaged over those that count.
Tensor WorldModel::Impl::FreeNats(const Tensor& kl, const Tensor& weight) const {
  const double free = config.objective().free_nats();
  if (config.objective().free_nats_rule() != config::v1::Objective::AVERAGED)
    return ((kl - free).clamp_min(0) * weight).sum(0).mean();
  const Tensor share = weight.sum(1);
  return ((kl * weight).sum(1) / share.clamp_min(1e-12)).clamp_min(free).dot(share) / share.sum();
}

Tensor WorldModel::Impl::KlLoss(const Observed& o, const Tensor& kl) const {
  const Tensor weight = o.posterior.weight.flatten(1);
  if (!config.objective().has_kl_balance()) return FreeNats(kl, weight);
  const auto& balance = config.objective().kl_balance();
  const LatentDistribution &q = o.posterior.components, &p = o.prior;
  return balance.dynamics() * FreeNats(latents.Divergence(q.Detach(), p).flatten(1), weight) +
         balance.representation() * FreeNats(latents.Divergence(q, p.Detach()).flatten(1), weight);
}

// All start rows roll as one batch: after k steps row i of the batch has landed on row i + k of the sequence.
void WorldModel::Impl::AddOvershooting(const Batch& batch, const Observed& o, const Tensor& action_part, const Tensor& first,
                                       const TensorMap& flat, const TensorMap& available, const Tensor& noise,
                                       bool all, LossOutputs& out) const {
  const int64_t t_size = first.size(0), b = first.size(1);
  const auto& latent = config.objective().overshooting();
  const bool article = latent.form() == Overshooting::ARTICLE;
  const bool with_latent = latent.distance() >= 2 && (all || latent.scale() > 0);
  const auto clamp = [&](int64_t distance) { return std::min(distance, t_size - 1); };
  const int64_t smallest = article ? 1 : 2, largest = with_latent ? clamp(latent.distance()) : 0;
  const int64_t decoded = clamp(config.objective().observation_overshooting().distance());
  const LatentDistribution target = article ? o.posterior.components : o.posterior.components.Detach();
  LatentState state{o.deter, o.stoch};
  Tensor valid = at::ones_like(first), divergence = at::zeros({}, options()), observation = at::zeros({}, options());
  for (int64_t k = 1; k <= std::max(largest, decoded); ++k) {
    const int64_t rows = (t_size - k) * b;
    const auto landed = [&](const Tensor& x) { return x.slice(0, k).flatten(0, 1); };
    // Drops the starts whose k-th step would leave the sequence.
    const int64_t starts = state.stoch.numel() / stoch;  // deter may be empty
    state = {state.deter.reshape({starts, deter}).slice(0, 0, rows), state.stoch.reshape({starts, stoch}).slice(0, 0, rows)};
    valid = valid.slice(0, 0, t_size - k).logical_and(first.slice(0, k).logical_not());
    const Tensor counts = valid.reshape({rows});
    const Predicted predicted = PredictFrom(landed(action_part), state);
    if (k >= smallest && k <= largest) {
      const int64_t index = k - smallest;
      const double weight = index < latent.weights_size() ? latent.weights(static_cast<int>(index)).weight() : 1;
      const LatentDistribution q = Slice(target, 1, k);
      const LatentDistribution flat_q{q.mean.flatten(1, 2), q.std.defined() ? q.std.flatten(1, 2) : Tensor()};
      Tensor kl = latents.Divergence(flat_q, predicted.prior);
      if (!article) kl = (kl - latent.free_nats()).clamp_min(0);
      const Tensor mean = MaskedMean((kl * o.posterior.weight.slice(1, k).flatten(1)).sum(0), counts);
      divergence = divergence + weight * (article ? mean.clamp_min(latent.free_nats()) : mean);
    }
    state = {predicted.deter, latents.Sample(predicted.prior, landed(noise[k]))};
    if (k <= decoded) observation = observation + DecodedLoss(state, batch, k, flat, available, counts);
  }
  const int64_t distances = largest - smallest + 1;
  if (with_latent) out.loss_overshooting = distances > 0 ? divergence / static_cast<double>(distances) : divergence;
  if (config.objective().has_observation_overshooting())
    out.loss_observation_overshooting = decoded > 0 ? observation / static_cast<double>(decoded) : observation;
}

// Observations and rewards of the rows from `k` on against open-loop states that have landed there.
Tensor WorldModel::Impl::DecodedLoss(const LatentState& state, const Batch& batch, int64_t k, const TensorMap& flat,
                                     const TensorMap& available, const Tensor& counts) const {
  const int64_t skipped = k * batch.reward.size(1);
  const Tensor feature = at::cat({state.deter, state.stoch}, -1);
  std::map<std::string, Likelihood> recon;
  TensorMap targets, there;
  for (const ModalityNet& net : modalities) {
    recon.emplace(net.name, DecodeOne(net, feature));
    targets.emplace(net.name, flat.at(net.name).slice(0, skipped));
    const Tensor& mask = Find(available, net.name);
    there.emplace(net.name, mask.defined() ? mask.slice(0, skipped).logical_and(counts) : counts);
  }
  const Tensor rewards = RewardLoss(PredictReward(feature), batch.reward.flatten().slice(0, skipped));
  return ObservationLoss(recon, targets, there) + config.objective().reward_scale() * MaskedMean(rewards, counts);
}

// What the model says of the rows it has seen, and its losses.
void WorldModel::Impl::AddPredictions(const Batch& batch, const TensorMap& flat, const TensorMap& available,
                                      LossOutputs& o) const {
  const at::IntArrayRef rows = batch.reward.sizes();
  const Tensor feature = at::cat({o.deter, o.stoch}, -1).flatten(0, 1);
  std::map<std::string, Likelihood> recon;
  for (const ModalityNet& net : modalities) {
    recon.emplace(net.name, DecodeOne(net, feature));
    o.recon.emplace(net.name, recon.at(net.name).mean.unflatten(0, rows));
  }
  o.loss_observation = ObservationLoss(recon, flat, available);
  const RewardPrediction rewards = PredictReward(feature);
  o.reward_mean = rewards.mean.view(rows);
  o.loss_reward = RewardLoss(rewards, batch.reward.flatten()).mean();
  if (!config.has_continue_head()) return;
  o.continue_logit = continues.out(continues.Feature(activation, feature)).view(rows);
  const Tensor goes_on = batch.is_terminal.eq(0).to(o.continue_logit.scalar_type());
  o.loss_continue = at::binary_cross_entropy_with_logits(o.continue_logit, goes_on);
}

void WorldModel::Impl::AddTotal(LossOutputs& o) const {
  const auto& objective = config.objective();
  o.loss_total = o.loss_observation + objective.reward_scale() * o.loss_reward;
  const std::pair<double, const Tensor*> terms[] = {
      {objective.kl_scale(), &o.loss_kl},
      {objective.global_prior_scale(), &o.loss_global_prior},
      {objective.continue_scale(), &o.loss_continue},
      {objective.overshooting().scale(), &o.loss_overshooting},
      {objective.observation_overshooting().scale(), &o.loss_observation_overshooting}};
  for (const auto& [scale, term] : terms)
    if (scale > 0 && term->defined()) o.loss_total = o.loss_total + scale * *term;
}

LossOutputs WorldModel::Loss(const Batch& batch, const LossNoise& noise, bool with_overshooting) const {
  const Impl& m = *impl_;
  const int64_t t = batch.reward.size(0), b = batch.reward.size(1);
  const Tensor first = batch.is_first.ne(0);
  const Tensor keep = first.logical_not().to(batch.action.scalar_type()).unsqueeze(-1);
  TensorMap flat;
  for (const auto& [name, x] : batch.observations) flat.emplace(name, x.flatten(0, 1));
  const TensorMap available = m.Available(batch, noise.dropout);
  const Embedding embedding = Encode(flat, available);
  const Tensor action_part = m.ActionPart(batch.action * keep);
  const Observed seen = m.Observe(action_part, embedding, first, keep, noise);

  LossOutputs o;
  o.deter = seen.deter;
  o.stoch = seen.stoch;
  o.prior_mean = seen.prior.mean;
  o.prior_std = seen.prior.std;
  o.post_mean = seen.drawn.mean;
  o.post_std = seen.drawn.std;
  o.embed = embedding.value.view({t, b, -1});
  m.AddPredictions(batch, flat, available, o);
  const Tensor kl = m.latents.Divergence(seen.posterior.components, seen.prior).flatten(1);
  o.kl = (kl * seen.posterior.weight.flatten(1)).sum(0).view({t, b});
  o.loss_kl = m.latents.deterministic() ? at::zeros({}, m.options()) : m.KlLoss(seen, kl);
  if (m.config.objective().global_prior_scale() > 0) o.loss_global_prior = m.latents.DivergenceFromStandard(seen.drawn).mean();
  if (OvershootingDistance(m.config, with_overshooting) > 0)
    m.AddOvershooting(batch, seen, action_part, first, flat, available, noise.overshooting, with_overshooting, o);
  m.AddTotal(o);
  return o;
}

}  // namespace orrery
