#include "libs/world_model/world_model.h"

#include <ATen/CPUGeneratorImpl.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/array.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/world_model/activation.h"
#include "libs/world_model/layout.h"
#include "libs/world_model/parallel_rows.h"
#include "libs/world_model/rollout.h"
#include "libs/world_model/rssm_sequence.h"
#include "libs/world_model/transposed_conv.h"

namespace orrery {
namespace {

using torch::Tensor;

struct Layer {
  Tensor weight, bias;
  Tensor operator()(const Tensor& x) const { return at::linear(x, weight, bias); }
};

std::vector<Tensor> Parameters(const std::vector<Layer>& layers) {
  std::vector<Tensor> parameters;
  for (const Layer& layer : layers) parameters.insert(parameters.end(), {layer.weight, layer.bias});
  return parameters;
}

struct ModalityNet {
  std::string name;
  bool is_image = false;
  config::v1::ImageModality image;
  double scale = 1;
  int64_t embedding = 0;
  std::vector<Layer> encoder;
  Layer decoder_input;  // images
  std::vector<Layer> decoder;
  Layer out;  // vectors
};

Gaussian ToGaussian(const Tensor& out, double min_std) {
  const auto parts = out.chunk(2, -1);
  return {parts[0], at::softplus(parts[1]) + min_std};
}

// KL(q || p) summed over the latent dimension.
Tensor Divergence(const Gaussian& q, const Gaussian& p) {
  const Tensor ratio = (q.std / p.std).square();
  const Tensor distance = ((q.mean - p.mean) / p.std).square();
  return (ratio + distance - 1 - ratio.log()).sum(-1) * 0.5;
}

// Whether a row resets some element, by row. On a device the answer would cost a synchronisation: there every row may.
std::vector<bool> RowsWithReset(const Tensor& first) {
  std::vector<bool> rows(first.size(0), true);
  if (!first.is_cpu()) return rows;
  const Tensor any = first.any(1).contiguous();
  const bool* values = any.const_data_ptr<bool>();
  rows.assign(values, values + rows.size());
  return rows;
}

RolloutActivation ToRollout(Activation activation) {
  switch (activation) {
    case config::v1::Model::ELU: return RolloutActivation::kElu;
    case config::v1::Model::TANH: return RolloutActivation::kTanh;
    case config::v1::Model::SILU: return RolloutActivation::kSilu;
    default: return RolloutActivation::kRelu;
  }
}

// Adds `tensor` to `root` under a dotted name, making the modules on the way.
void Register(torch::nn::Module& root, const std::string& name, const Tensor& tensor) {
  torch::nn::Module* module = &root;
  size_t begin = 0;
  for (size_t dot; (dot = name.find('.', begin)) != std::string::npos; begin = dot + 1) {
    const std::string part = name.substr(begin, dot - begin);
    const auto& children = module->named_children();
    const std::shared_ptr<torch::nn::Module>* child = children.find(part);
    module = child != nullptr ? child->get() : module->register_module(part, std::make_shared<torch::nn::Module>()).get();
  }
  module->register_parameter(name.substr(begin), tensor);
}

}  // namespace

struct WorldModel::Impl {
  explicit Impl(const config::v1::Model& model);
  // Binds the networks to the parameters by name.
  void Bind(TensorMap named);

  Tensor EncodeOne(const ModalityNet& net, const Tensor& x) const;
  Tensor DecodeOne(const ModalityNet& net, const Tensor& feature) const;
  // `f` of all rows of x, by the workers where there are some and a gradient is wanted.
  Tensor ByWorkers(const std::function<Tensor(const Tensor&)>& f, const Tensor& x, const std::vector<Layer>& layers) const;
  Gaussian PriorOf(const Tensor& deter) const;
  Tensor RewardOf(const Tensor& feature) const;
  Tensor ReturnsByTorch(const LatentState& start, const Tensor& actions, const Tensor& noise) const;
  Tensor ReturnsOnCpu(const LatentState& start, const Tensor& actions, const Tensor& noise) const;
  // Action's part of rssm.input.
  Tensor ActionPart(const Tensor& x) const { return at::linear(x, input_action_weight(), input.bias); }
  Tensor input_state_weight() const { return input.weight.narrow(1, 0, stoch); }
  Tensor input_action_weight() const { return input.weight.narrow(1, stoch, input.weight.size(1) - stoch); }
  // The weights as rollouts on the CPU take them, packed anew when a parameter has changed.
  std::shared_ptr<const PackedModel> Packed() const;
  std::unique_ptr<PackedModel> Pack(const RolloutKernel& kernel) const;
  // GRU step from state's and action's parts of rssm.input.
  Tensor Recur(const Tensor& action_part, const LatentState& state) const;
  Tensor ObservationLoss(const TensorMap& recon, const TensorMap& observations) const;
  Tensor FreeNats(const Tensor& kl) const;
  Tensor KlLoss(const LossOutputs& o, const Gaussian& posterior, const Gaussian& prior) const;
  Tensor OvershootingLoss(const LossOutputs& o, const Tensor& action_part, const Tensor& first,
                          const Tensor& noise) const;

  const config::v1::Model config;
  const int64_t deter, stoch, action_size;
  const double min_std;
  const Activation activation, conv_activation;
  TensorMap parameters;
  std::vector<ModalityNet> modalities;
  uint64_t structure_hash = 0;

  Layer input, prior_hidden, prior_out, posterior_hidden, posterior_out;
  Tensor gru_weight_ih, gru_weight_hh, gru_bias_ih, gru_bias_hh;
  std::vector<Layer> reward;
  Layer reward_out;
  std::shared_ptr<RowWorkers> workers;
  bool bfloat16 = false;

  mutable absl::Mutex packed_mu;
  mutable std::shared_ptr<const PackedModel> packed ABSL_GUARDED_BY(packed_mu);
  mutable std::vector<std::pair<const void*, int64_t>> packed_versions ABSL_GUARDED_BY(packed_mu);
};

WorldModel::Impl::Impl(const config::v1::Model& model)
    : config(model),
      deter(model.deterministic_size()),
      stoch(model.stochastic_size()),
      action_size(ActionSize(model)),
      min_std(model.min_std()),
      activation(model.activation()),
      conv_activation(model.conv_activation()) {}

void WorldModel::Impl::Bind(TensorMap named) {
  parameters = std::move(named);
  const auto layer = [&](const std::string& name) {
    return Layer{parameters.at(name + ".weight"), parameters.at(name + ".bias")};
  };
  const auto layers = [&](const std::string& name, int count) {
    std::vector<Layer> all;
    for (int i = 1; i <= count; ++i) all.push_back(layer(absl::StrCat(name, i)));
    return all;
  };
  for (const config::v1::Modality& m : ModalitiesByName(config)) {
    ModalityNet net;
    net.name = m.name();
    net.is_image = m.has_image();
    net.embedding = EmbeddingSize(m);
    const std::string encoder = "encoder." + m.name(), decoder = "decoder." + m.name();
    if (m.has_image()) {
      net.image = m.image();
      net.scale = m.image().scale();
      net.encoder = layers(encoder + ".conv", ImageLayers(m.image()));
      net.decoder_input = layer(decoder + ".input");
      net.decoder = layers(decoder + ".deconv", ImageLayers(m.image()));
    } else {
      net.scale = m.vector().scale();
      net.encoder = layers(encoder + ".fc", m.vector().layers());
      net.decoder = layers(decoder + ".fc", m.vector().layers());
      net.out = layer(decoder + ".out");
    }
    modalities.push_back(std::move(net));
  }
  input = layer("rssm.input");
  gru_weight_ih = parameters.at("rssm.gru.weight_ih");
  gru_weight_hh = parameters.at("rssm.gru.weight_hh");
  gru_bias_ih = parameters.at("rssm.gru.bias_ih");
  gru_bias_hh = parameters.at("rssm.gru.bias_hh");
  prior_hidden = layer("rssm.prior.hidden");
  prior_out = layer("rssm.prior.out");
  posterior_hidden = layer("rssm.posterior.hidden");
  posterior_out = layer("rssm.posterior.out");
  reward = layers("reward.fc", config.reward().layers());
  reward_out = layer("reward.out");
}

Tensor WorldModel::Impl::EncodeOne(const ModalityNet& net, const Tensor& x) const {
  if (!net.is_image) {
    Tensor y = x;
    for (const Layer& l : net.encoder) y = Activate(activation, l(y));
    return y;
  }
  const auto convolutions = [&](const Tensor& image) {
    Tensor y = image;
    for (const Layer& l : net.encoder) y = Activate(conv_activation, at::conv2d(y, l.weight, l.bias, /*stride=*/2));
    return y.flatten(1);
  };
  return ByWorkers(convolutions, x, net.encoder);
}

Tensor WorldModel::Impl::DecodeOne(const ModalityNet& net, const Tensor& feature) const {
  if (!net.is_image) {
    Tensor y = feature;
    for (const Layer& l : net.decoder) y = Activate(activation, l(y));
    return net.out(y);
  }
  const auto deconvolutions = [&](const Tensor& pixel) {
    Tensor y = pixel;
    for (size_t i = 0; i < net.decoder.size(); ++i) {
      y = TransposedConv(y, net.decoder[i].weight, net.decoder[i].bias);
      if (i + 1 < net.decoder.size()) y = Activate(conv_activation, y);
    }
    return y;
  };
  return ByWorkers(deconvolutions, net.decoder_input(feature).unsqueeze(-1).unsqueeze(-1), net.decoder);
}

Tensor WorldModel::Impl::ByWorkers(const std::function<Tensor(const Tensor&)>& f, const Tensor& x,
                                   const std::vector<Layer>& layers) const {
  if (workers == nullptr || !x.is_cpu() || !at::GradMode::is_enabled()) return f(x);
  return ParallelRows(*workers, f, x, Parameters(layers));
}

Gaussian WorldModel::Impl::PriorOf(const Tensor& h) const {
  return ToGaussian(prior_out(Activate(activation, prior_hidden(h))), min_std);
}

Tensor WorldModel::Impl::RewardOf(const Tensor& feature) const {
  Tensor y = feature;
  for (const Layer& l : reward) y = Activate(activation, l(y));
  return reward_out(y).squeeze(-1);
}

std::unique_ptr<PackedModel> WorldModel::Impl::Pack(const RolloutKernel& kernel) const {
  auto pack = std::make_unique<PackedModel>(kernel.pair);
  RolloutModel& m = pack->model;
  m.deter = deter;
  m.stoch = stoch;
  m.hidden = input.bias.size(0);
  m.action = action_size;
  m.min_std = static_cast<float>(min_std);
  m.activation = ToRollout(activation);
  const auto gates = [&](const Tensor& x) { return x.narrow(0, 0, 2 * deter); };
  const auto candidate = [&](const Tensor& x) { return x.narrow(0, 2 * deter, deter); };
  m.input = pack->Layer({input_state_weight(), input_action_weight()}, input.bias);
  m.reset_update = pack->Layer({gates(gru_weight_ih), gates(gru_weight_hh)}, gates(gru_bias_ih) + gates(gru_bias_hh));
  m.candidate_input = pack->Layer({candidate(gru_weight_ih)}, candidate(gru_bias_ih));
  m.candidate_recurrent = pack->Layer({candidate(gru_weight_hh)}, candidate(gru_bias_hh));
  m.prior_hidden = pack->Layer({prior_hidden.weight}, prior_hidden.bias);
  m.prior_out = pack->Layer({prior_out.weight}, prior_out.bias);
  std::vector<Layer> head = reward;
  head.push_back(reward_out);
  std::vector<RolloutLayer> layers;
  m.widest = std::max(m.hidden, 2 * stoch);
  for (const Layer& layer : head) {
    const Tensor& w = layer.weight;
    layers.push_back(layers.empty() ? pack->Layer({w.narrow(1, 0, deter), w.narrow(1, deter, stoch)}, layer.bias)
                                    : pack->Layer({w}, layer.bias));
    m.widest = std::max(m.widest, w.size(0));
  }
  pack->SetReward(std::move(layers));
  return pack;
}

std::shared_ptr<const PackedModel> WorldModel::Impl::Packed() const {
  std::vector<std::pair<const void*, int64_t>> versions;
  for (const auto& [name, parameter] : parameters)
    versions.emplace_back(parameter.const_data_ptr(), parameter.is_inference() ? 0 : parameter._version());
  absl::MutexLock lock(&packed_mu);
  if (packed == nullptr || versions != packed_versions) {
    packed = Pack(BestRolloutKernel(bfloat16));
    packed_versions = std::move(versions);
  }
  return packed;
}

Tensor WorldModel::Impl::Recur(const Tensor& action_part, const LatentState& state) const {
  const Tensor x = Activate(activation, at::addmm(action_part, state.stoch, input_state_weight().t()));
  return at::gru_cell(x, state.deter, gru_weight_ih, gru_weight_hh, gru_bias_ih, gru_bias_hh);
}

// Sum of ½ squared errors over the elements of an observation, mean over rows and batch, weighted by modality.
Tensor WorldModel::Impl::ObservationLoss(const TensorMap& recon, const TensorMap& observations) const {
  Tensor loss;
  for (const ModalityNet& net : modalities) {
    const Tensor& target = observations.at(net.name);
    const double weight = 0.5 * net.scale / static_cast<double>(target.size(0) * target.size(1));
    const Tensor term = at::mse_loss(recon.at(net.name), target, at::Reduction::Sum) * weight;
    loss = loss.defined() ? loss + term : term;
  }
  return loss;
}

Tensor WorldModel::Impl::FreeNats(const Tensor& kl) const {
  const double free = config.objective().free_nats();
  if (config.objective().free_nats_rule() == config::v1::Objective::AVERAGED) return kl.mean().clamp_min(free);
  return (kl - free).clamp_min(0).mean();
}

Tensor WorldModel::Impl::KlLoss(const LossOutputs& o, const Gaussian& posterior, const Gaussian& prior) const {
  if (!config.objective().has_kl_balance()) return FreeNats(o.kl);
  const auto& balance = config.objective().kl_balance();
  const auto detached = [](const Gaussian& g) { return Gaussian{g.mean.detach(), g.std.detach()}; };
  return balance.dynamics() * FreeNats(Divergence(detached(posterior), prior)) +
         balance.representation() * FreeNats(Divergence(posterior, detached(prior)));
}

// All start rows roll as one batch: after k steps row i of the batch has landed on row i + k of the sequence.
Tensor WorldModel::Impl::OvershootingLoss(const LossOutputs& o, const Tensor& action_part, const Tensor& first,
                                          const Tensor& noise) const {
  const int64_t t_size = first.size(0), b = first.size(1);
  const int64_t distance = std::min<int64_t>(config.objective().overshooting().distance(), t_size - 1);
  if (distance < 2) return at::zeros({}, o.stoch.options());
  const Gaussian target{o.post_mean.detach(), o.post_std.detach()};
  LatentState state{o.deter, o.stoch};
  Tensor valid = at::ones_like(first), sum;
  for (int64_t k = 1; k <= distance; ++k) {
    const int64_t rows = (t_size - k) * b;
    const auto landed = [&](const Tensor& x) { return x.slice(0, k).reshape({rows, x.size(-1)}); };
    // Drops the starts whose k-th step would leave the sequence.
    state = {state.deter.reshape({-1, deter}).slice(0, 0, rows), state.stoch.reshape({-1, stoch}).slice(0, 0, rows)};
    valid = valid.slice(0, 0, t_size - k).logical_and(first.slice(0, k).logical_not());
    state.deter = Recur(landed(action_part), state);
    const Gaussian prior = PriorOf(state.deter);
    if (k >= 2) {
      const Tensor kl = Divergence({landed(target.mean), landed(target.std)}, prior);
      const Tensor counted = (kl - config.objective().overshooting().free_nats()).clamp_min(0);
      const Tensor weight = valid.reshape({rows}).to(kl.scalar_type());
      const Tensor term = counted.dot(weight) / weight.sum().clamp_min(1);
      sum = sum.defined() ? sum + term : term;
    }
    if (k < distance) state.stoch = at::addcmul(prior.mean, prior.std, landed(noise[k]));
  }
  return sum / static_cast<double>(distance - 1);
}

WorldModel::WorldModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
WorldModel::~WorldModel() = default;

absl::StatusOr<std::shared_ptr<WorldModel>> WorldModel::Create(const config::v1::Model& config, uint64_t seed) {
  RETURN_IF_ERROR(Validate(config, /*complete=*/true));
  return CatchExceptions("making the world model", [&]() -> absl::StatusOr<std::shared_ptr<WorldModel>> {
    auto impl = std::make_unique<Impl>(config);
    std::shared_ptr<WorldModel> model(new WorldModel(std::move(impl)));
    // A generator of its own, so that the process's global one stays as it is.
    torch::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    TensorMap parameters;
    std::string structure;
    for (const ParameterSpec& spec : ParameterLayout(config)) {
      Tensor value = at::empty(spec.shape, at::kFloat).uniform_(-spec.bound, spec.bound, generator);
      value.set_requires_grad(true);
      Register(*model, spec.name, value);
      parameters.emplace(spec.name, value);
      absl::StrAppend(&structure, spec.name, ShapeString(spec.shape), ";");
    }
    model->impl_->Bind(parameters);
    model->impl_->structure_hash = DeriveSeed(0, structure);
    return model;
  });
}

const config::v1::Model& WorldModel::config() const { return impl_->config; }
uint64_t WorldModel::StructureHash() const { return impl_->structure_hash; }
std::unique_ptr<PackedModel> WorldModel::PackForRollouts(const RolloutKernel& kernel) const {
  return impl_->Pack(kernel);
}
void WorldModel::UseWorkers(std::shared_ptr<RowWorkers> workers) { impl_->workers = std::move(workers); }
void WorldModel::UseBfloat16() { impl_->bfloat16 = true; }
int WorldModel::deterministic_size() const { return static_cast<int>(impl_->deter); }
int WorldModel::stochastic_size() const { return static_cast<int>(impl_->stoch); }
int WorldModel::action_size() const { return static_cast<int>(impl_->action_size); }

LatentState WorldModel::InitialState(int64_t n) const {
  const auto options = impl_->input.bias.options().requires_grad(false);
  return {at::zeros({n, impl_->deter}, options), at::zeros({n, impl_->stoch}, options)};
}

TensorMap WorldModel::Preprocess(const TensorMap& stored, c10::optional<torch::Generator> generator) const {
  const at::Device device = impl_->input.bias.device();
  TensorMap out;
  for (const ModalityNet& net : impl_->modalities) {
    const auto it = stored.find(net.name);
    if (it == stored.end()) continue;
    if (!net.is_image) {
      out.emplace(net.name, it->second.to(device, at::kFloat));
      continue;
    }
    // HWC in memory is what convolutions take fastest; only the order of the dimensions changes.
    Tensor x = it->second.to(device).to(at::kFloat).movedim(-1, -3);
    const int bits = net.image.bits();
    if (bits == 8) {
      x.mul_(1.0 / 255).sub_(0.5);
    } else {
      x.mul_(1.0 / (1 << (8 - bits))).floor_();
      if (generator.has_value() && generator->defined()) x.add_(at::rand_like(x, *generator));
      x.mul_(1.0 / (1 << bits)).sub_(0.5);
    }
    out.emplace(net.name, x);
  }
  return out;
}

Tensor WorldModel::Encode(const TensorMap& observations) const {
  int64_t n = -1;
  for (const ModalityNet& net : impl_->modalities)
    if (const auto it = observations.find(net.name); it != observations.end()) n = it->second.size(0);
  TORCH_CHECK(n >= 0, "no modality of the model is in the observation");
  std::vector<Tensor> parts;
  for (const ModalityNet& net : impl_->modalities) {
    const auto it = observations.find(net.name);
    parts.push_back(it != observations.end()
                        ? impl_->EncodeOne(net, it->second)
                        : at::zeros({n, net.embedding}, impl_->input.bias.options().requires_grad(false)));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts, -1);
}

Tensor WorldModel::Transition(const LatentState& state, const Tensor& action) const {
  return impl_->Recur(impl_->ActionPart(action), state);
}

Gaussian WorldModel::Prior(const Tensor& deter) const {
  return impl_->PriorOf(deter);
}

Gaussian WorldModel::Posterior(const Tensor& deter, const Tensor& embed) const {
  const Tensor hidden = Activate(impl_->activation, impl_->posterior_hidden(at::cat({deter, embed}, -1)));
  return ToGaussian(impl_->posterior_out(hidden), impl_->min_std);
}

Tensor WorldModel::Reward(const LatentState& state) const {
  return impl_->RewardOf(at::cat({state.deter, state.stoch}, -1));
}

TensorMap WorldModel::Decode(const LatentState& state) const {
  const Tensor feature = at::cat({state.deter, state.stoch}, -1);
  TensorMap out;
  for (const ModalityNet& net : impl_->modalities) out.emplace(net.name, impl_->DecodeOne(net, feature));
  return out;
}

LossOutputs WorldModel::Loss(const Batch& batch, const LossNoise& noise, bool with_overshooting) const {
  const Impl& m = *impl_;
  const int64_t t = batch.reward.size(0), b = batch.reward.size(1);
  const Tensor first = batch.is_first.ne(0);
  const Tensor keep = first.logical_not().to(batch.action.scalar_type()).unsqueeze(-1);

  LossOutputs o;
  TensorMap flat;
  for (const auto& [name, x] : batch.observations) flat.emplace(name, x.flatten(0, 1));
  const Tensor embed = Encode(flat);
  o.embed = embed.view({t, b, -1});
  const Tensor action_part = m.ActionPart(batch.action * keep);

  RssmSequenceInputs in{.action_part = action_part,
                        .embed_part = at::linear(embed, m.posterior_hidden.weight.slice(1, m.deter),
                                                 m.posterior_hidden.bias)
                                          .view({t, b, -1}),
                        .state_weight = m.input_state_weight(),
                        .weight_ih = m.gru_weight_ih,
                        .bias_ih = m.gru_bias_ih,
                        .weight_hh = m.gru_weight_hh,
                        .bias_hh = m.gru_bias_hh,
                        .deter_weight = m.posterior_hidden.weight.slice(1, 0, m.deter),
                        .out_weight = m.posterior_out.weight,
                        .out_bias = m.posterior_out.bias,
                        .noise = noise.posterior,
                        .keep = keep,
                        .resets = RowsWithReset(first),
                        .activation = m.activation,
                        .min_std = m.min_std};
  const RssmSequenceOutputs sequence = RunRssmSequence(in);
  o.deter = sequence.deter;
  o.stoch = sequence.stoch;
  o.post_mean = sequence.post_mean;
  o.post_std = sequence.post_std;
  const Gaussian prior = Prior(o.deter);
  o.prior_mean = prior.mean;
  o.prior_std = prior.std;

  const Tensor feature = at::cat({o.deter, o.stoch}, -1).flatten(0, 1);
  for (const ModalityNet& net : m.modalities)
    o.recon.emplace(net.name, m.DecodeOne(net, feature).unflatten(0, at::IntArrayRef{t, b}));
  o.reward_mean = m.RewardOf(feature).view({t, b});
  const Gaussian posterior{o.post_mean, o.post_std};
  o.kl = Divergence(posterior, prior);

  const auto& objective = m.config.objective();
  o.loss_observation = m.ObservationLoss(o.recon, batch.observations);
  o.loss_reward = 0.5 * at::mse_loss(o.reward_mean, batch.reward);
  o.loss_kl = m.KlLoss(o, posterior, prior);
  o.loss_total = o.loss_observation + objective.reward_scale() * o.loss_reward + objective.kl_scale() * o.loss_kl;
  const double scale = objective.overshooting().scale();
  if (objective.overshooting().distance() >= 2 && (with_overshooting || scale > 0)) {
    o.loss_overshooting = m.OvershootingLoss(o, action_part, first, noise.overshooting);
    if (scale > 0) o.loss_total = o.loss_total + scale * o.loss_overshooting;
  }
  return o;
}

LossNoise WorldModel::DrawNoise(int64_t t, int64_t b, torch::Generator& generator, bool with_overshooting) const {
  const auto draw = [&](at::IntArrayRef shape) {
    return at::randn(shape, generator, at::TensorOptions(at::kFloat).device(generator.device()))
        .to(impl_->input.bias.options().requires_grad(false));
  };
  LossNoise noise;
  noise.posterior = draw({t, b, impl_->stoch});
  const auto& overshooting = impl_->config.objective().overshooting();
  if (overshooting.distance() >= 2 && (with_overshooting || overshooting.scale() > 0))
    noise.overshooting = draw({overshooting.distance() + 1, t, b, impl_->stoch});
  return noise;
}

Tensor WorldModel::ImaginedReturns(const LatentState& start, const Tensor& actions, const Tensor& noise) const {
  torch::NoGradGuard no_grad;
  const bool fused = impl_->input.bias.is_cpu() && impl_->input.bias.scalar_type() == at::kFloat;
  return fused ? impl_->ReturnsOnCpu(start, actions, noise) : impl_->ReturnsByTorch(start, actions, noise);
}

Tensor WorldModel::Impl::ReturnsOnCpu(const LatentState& start, const Tensor& actions, const Tensor& noise) const {
  const Tensor h = start.deter.contiguous(), s = start.stoch.contiguous(), a = actions.contiguous(), z = noise.contiguous();
  Tensor returns = at::empty({a.size(1), a.size(2)}, h.options());
  const std::shared_ptr<const PackedModel> weights = Packed();
  Roll(BestRolloutKernel(bfloat16), weights->model,
       {.horizon = a.size(0), .agents = a.size(1), .candidates = a.size(2), .deter = h.const_data_ptr<float>(),
        .stoch = s.const_data_ptr<float>(), .actions = a.const_data_ptr<float>(), .noise = z.const_data_ptr<float>(),
        .returns = returns.mutable_data_ptr<float>()},
       workers.get());
  return returns;
}

// All candidates of an agent share its state, so the state's parts of the first step are computed once per agent.
Tensor WorldModel::Impl::ReturnsByTorch(const LatentState& start, const Tensor& actions, const Tensor& noise) const {
  const Impl& m = *this;
  const int64_t n = actions.size(1), j = actions.size(2), rows = n * j;
  const Tensor weight = m.input_state_weight().t();
  const auto spread = [&](const Tensor& x) { return x.unsqueeze(1).expand({n, j, x.size(1)}).reshape({rows, x.size(1)}); };
  LatentState state{spread(start.deter), {}};
  Tensor state_part = spread(start.stoch.mm(weight)), total = at::zeros({rows}, start.stoch.options());
  for (int64_t t = 0; t < actions.size(0); ++t) {
    Tensor x = at::addmm(m.input.bias, actions[t].reshape({rows, m.action_size}), m.input_action_weight().t());
    if (t == 0) {
      x.add_(state_part);
    } else {
      x.addmm_(state.stoch, weight);
    }
    state.deter = at::gru_cell(Activate(m.activation, x), state.deter, m.gru_weight_ih, m.gru_weight_hh, m.gru_bias_ih,
                               m.gru_bias_hh);
    const Gaussian prior = PriorOf(state.deter);
    state.stoch = at::addcmul(prior.mean, prior.std, noise[t].reshape({rows, m.stoch}));
    total.add_(RewardOf(at::cat({state.deter, state.stoch}, -1)));
  }
  return total.view({n, j});
}

}  // namespace orrery
