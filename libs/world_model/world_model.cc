#include "libs/world_model/world_model.h"

#include <ATen/CPUGeneratorImpl.h>

#include <atomic>

#include "absl/strings/str_cat.h"
#include "libs/base/array.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "libs/world_model/heads.h"
#include "libs/world_model/layout.h"
#include "libs/world_model/transposed_conv.h"
#include "libs/world_model/world_model_impl.h"

namespace orrery {
namespace {

using torch::Tensor;

std::vector<Tensor> Parameters(const std::vector<Layer>& layers) {
  std::vector<Tensor> parameters;
  for (const Layer& layer : layers) parameters.insert(parameters.end(), {layer.weight, layer.bias});
  return parameters;
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

// Looks networks up among the parameters.
class Binder {
 public:
  explicit Binder(const TensorMap& parameters) : parameters_(parameters) {}

  // Undefined when there is none.
  Tensor Find(const std::string& name) const {
    const auto it = parameters_.find(name);
    return it == parameters_.end() ? Tensor() : it->second;
  }
  Layer One(const std::string& name) const {
    return {Find(name + ".weight"), Find(name + ".bias"), Find(name + ".norm.weight"), Find(name + ".norm.bias")};
  }
  std::vector<Layer> Several(const std::string& name) const {
    std::vector<Layer> all;
    for (int i = 1; parameters_.count(absl::StrCat(name, i, ".weight")) > 0; ++i) all.push_back(One(absl::StrCat(name, i)));
    return all;
  }
  Mlp Network(const std::string& name) const { return {Several(name + ".fc"), One(name + ".out"), One(name + ".std")}; }

 private:
  const TensorMap& parameters_;
};

ModalityNet BindModality(const config::v1::Modality& m, config::v1::Model::Activation activation, const Binder& binder) {
  ModalityNet net;
  net.name = m.name();
  net.is_image = m.has_image();
  net.embedding = EmbeddingSize(m);
  const std::string encoder = "encoder." + m.name(), decoder = "decoder." + m.name();
  net.variance = m.has_image() ? m.image().variance() : m.vector().variance();
  net.scale = m.has_image() ? m.image().scale() : m.vector().scale();
  if (m.has_image()) {
    net.image = m.image();
    net.encoder = binder.Several(encoder + ".conv");
    net.decoder_input = binder.One(decoder + ".input");
    net.deconvolutions = binder.Several(decoder + ".deconv");
  } else {
    net.symlog = m.vector().symlog();
    net.encoder = binder.Several(encoder + ".fc");
    net.decoder = binder.Network(decoder);
    net.decoder_activation = m.vector().has_decoder_activation() ? m.vector().decoder_activation() : activation;
  }
  if (net.variance == config::v1::PER_OUTPUT) net.std = binder.One(decoder + ".std");
  if (net.variance == config::v1::SHARED) net.raw_std = binder.Find(decoder + ".std");
  return net;
}

Tensor Feature(const LatentState& state) { return at::cat({state.deter, state.stoch}, -1); }

std::atomic<int64_t> next_instance = 0;

}  // namespace

WorldModel::Impl::Impl(const config::v1::Model& model)
    : config(model),
      instance(next_instance++),
      latents(model),
      deter(DeterministicSize(model)),
      stoch(latents.size()),
      action_size(ActionSize(model)),
      min_std(model.min_std()),
      activation(model.activation()),
      conv_activation(model.conv_activation()) {}

void WorldModel::Impl::Bind(TensorMap named) {
  parameters = std::move(named);
  const Binder binder(parameters);
  int64_t begin = 0;
  for (const config::v1::Modality& m : ModalitiesByName(config)) {
    modalities.push_back(BindModality(m, activation, binder));
    modalities.back().begin = begin;
    begin += modalities.back().embedding;
  }
  input = binder.One("rssm.input");
  gru_weight_ih = binder.Find("rssm.gru.weight_ih");
  gru_weight_hh = binder.Find("rssm.gru.weight_hh");
  gru_bias_ih = binder.Find("rssm.gru.bias_ih");
  gru_bias_hh = binder.Find("rssm.gru.bias_hh");
  gru_norm_weight = binder.Find("rssm.gru.norm.weight");
  gru_norm_bias = binder.Find("rssm.gru.norm.bias");
  prior_hidden = binder.One("rssm.prior.hidden");
  prior_out = binder.One("rssm.prior.out");
  const auto expert = [&](const std::string& name, int64_t from, int64_t size) {
    experts.push_back({binder.One(name + ".hidden"), binder.One(name + ".out"), from, size});
  };
  if (HasExperts(config)) {
    for (const ModalityNet& net : modalities) expert("rssm.posterior." + net.name, net.begin, net.embedding);
  } else {
    expert("rssm.posterior", 0, begin);
  }
  reward = binder.Network("reward");
  if (config.reward().variance() == config::v1::SHARED) reward_raw_std = binder.Find("reward.std");
  if (config.has_continue_head()) continues = binder.Network("continue");
  if (config.has_behavior()) {
    actor = binder.Network("actor");
    value = binder.Network("value");
  }
}

Tensor WorldModel::Impl::EncodeOne(const ModalityNet& net, const Tensor& x) const {
  if (!net.is_image) {
    Tensor y = net.symlog ? Symlog(x) : x;
    for (const Layer& l : net.encoder) y = l.Hidden(activation, y);
    return y;
  }
  const auto convolutions = [&](const Tensor& image) {
    const at::ScalarType type = ConvolutionType(image);
    Tensor y = image.to(type);
    for (const Layer& l : net.encoder)
      y = Activate(conv_activation, at::conv2d(y, l.weight.to(type), l.bias.to(type), /*stride=*/2));
    return y.flatten(1).to(image.scalar_type());
  };
  return ByWorkers(convolutions, x, net.encoder);
}

Likelihood WorldModel::Impl::DecodeOne(const ModalityNet& net, const Tensor& feature) const {
  const auto shared = [&] { return net.raw_std.defined() ? LikelihoodStd(net.raw_std) : Tensor(); };
  if (!net.is_image) {
    const Tensor y = net.decoder.Feature(net.decoder_activation, feature);
    return {net.decoder.out(y), net.std.weight.defined() ? LikelihoodStd(net.std(y)) : shared()};
  }
  // Mean, and behind it along the channels the raw deviation.
  std::vector<Layer> layers = net.deconvolutions;
  if (net.std.weight.defined()) {
    layers.back() = {at::cat({layers.back().weight, net.std.weight}, 1), at::cat({layers.back().bias, net.std.bias}), {}, {}};
  }
  const auto deconvolutions = [&](const Tensor& pixel) {
    const at::ScalarType type = ConvolutionType(pixel);
    Tensor y = pixel.to(type);
    for (size_t i = 0; i < layers.size(); ++i) {
      y = TransposedConv(y, layers[i].weight.to(type), layers[i].bias.to(type));
      if (i + 1 < layers.size()) y = Activate(conv_activation, y);
    }
    return y.to(pixel.scalar_type());
  };
  const Tensor y = ByWorkers(deconvolutions, net.decoder_input(feature).unsqueeze(-1).unsqueeze(-1), layers);
  if (!net.std.weight.defined()) return {y, shared()};
  const auto parts = y.chunk(2, 1);
  return {parts[0], LikelihoodStd(parts[1])};
}

Tensor WorldModel::Impl::ByWorkers(const std::function<Tensor(const Tensor&)>& f, const Tensor& x,
                                   const std::vector<Layer>& layers) const {
  if (workers == nullptr || !x.is_cpu() || !at::GradMode::is_enabled()) return f(x);
  return ParallelRows(*workers, f, x, Parameters(layers));
}

RewardPrediction WorldModel::Impl::PredictReward(const Tensor& feature) const {
  const Tensor inner = reward.Feature(activation, feature), out = reward.out(inner);
  if (config.reward().output() == config::v1::RewardHead::TWO_HOT) return {TwoHotMean(out), {}, out};
  const Tensor mean = out.squeeze(-1);
  if (reward_raw_std.defined()) return {mean, LikelihoodStd(reward_raw_std), {}};
  if (reward.raw_std.weight.defined()) return {mean, LikelihoodStd(reward.raw_std(inner).squeeze(-1)), {}};
  return {mean, {}, {}};
}

Tensor WorldModel::Impl::ValueOf(const Tensor& feature) const {
  TORCH_CHECK(config.has_behavior(), "the model has no value");
  return value.out(value.Feature(activation, feature)).squeeze(-1);
}

WorldModel::WorldModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
WorldModel::~WorldModel() = default;

absl::StatusOr<std::shared_ptr<WorldModel>> WorldModel::Create(const config::v1::Model& config, uint64_t seed) {
  RETURN_IF_ERROR(Validate(config, /*complete=*/true));
  return CatchExceptions("making the world model", [&]() -> absl::StatusOr<std::shared_ptr<WorldModel>> {
    std::shared_ptr<WorldModel> model(new WorldModel(std::make_unique<Impl>(config)));
    // A generator of its own, so that the process's global one stays as it is.
    torch::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    TensorMap parameters;
    std::string structure;
    for (const ParameterSpec& spec : ParameterLayout(config)) {
      Tensor value = at::full(spec.shape, spec.center, at::kFloat);
      if (spec.bound > 0) value.uniform_(-spec.bound, spec.bound, generator);
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
std::vector<std::pair<const void*, int64_t>> WorldModel::ParameterVersions() const { return impl_->ParameterVersions(); }
void WorldModel::UseWorkers(std::shared_ptr<RowWorkers> workers) { impl_->workers = std::move(workers); }
void WorldModel::UseBfloat16() { impl_->bfloat16 = true; }
int WorldModel::deterministic_size() const { return static_cast<int>(impl_->deter); }
int WorldModel::stochastic_size() const { return static_cast<int>(impl_->stoch); }
int WorldModel::action_size() const { return static_cast<int>(impl_->action_size); }
const Latents& WorldModel::latents() const { return impl_->latents; }

LatentState WorldModel::InitialState(int64_t n) const {
  return {at::zeros({n, impl_->deter}, impl_->options()), at::zeros({n, impl_->stoch}, impl_->options())};
}

TensorMap WorldModel::Preprocess(const TensorMap& stored, c10::optional<torch::Generator> generator) const {
  if (!generator.has_value() || !generator->defined()) return Preprocess(stored, PixelNoise());
  return Preprocess(stored, [&](const Tensor& pictures) {
    return at::rand(pictures.sizes(), *generator, pictures.options().dtype(at::kFloat));
  });
}

TensorMap WorldModel::Preprocess(const TensorMap& stored, const PixelNoise& noise) const {
  TensorMap out;
  for (const ModalityNet& net : impl_->modalities) {
    const auto it = stored.find(net.name);
    if (it == stored.end()) continue;
    if (!net.is_image) {
      out.emplace(net.name, it->second.to(at::kFloat));
      continue;
    }
    // HWC in memory is what convolutions take fastest; only the order of the dimensions changes.
    Tensor x = it->second.to(at::kFloat).movedim(-1, -3);
    const int bits = net.image.bits();
    if (bits == 8) {
      x.mul_(1.0 / 255).sub_(0.5);
    } else {
      x.mul_(1.0 / (1 << (8 - bits))).floor_();
      if (noise != nullptr) x.add_(noise(it->second).movedim(-1, -3));
      x.mul_(1.0 / (1 << bits)).sub_(0.5);
    }
    out.emplace(net.name, x);
  }
  return out;
}

Embedding WorldModel::Encode(const TensorMap& observations, const TensorMap& available, int64_t n) const {
  const auto& nets = impl_->modalities;
  for (const ModalityNet& net : nets)
    if (const auto it = observations.find(net.name); it != observations.end()) n = it->second.size(0);
  TORCH_CHECK(n >= 0, "no modality of the model is in the observation");
  std::vector<Tensor> parts, there;
  bool all = true;
  for (const ModalityNet& net : nets) {
    const auto seen = observations.find(net.name);
    const auto mask = available.find(net.name);
    if (seen == observations.end()) {
      parts.push_back(at::zeros({n, net.embedding}, impl_->options()));
      there.push_back(at::zeros({n}, impl_->options().dtype(at::kBool)));
      all = false;
      continue;
    }
    parts.push_back(impl_->EncodeOne(net, seen->second));
    there.push_back(at::ones({n}, impl_->options().dtype(at::kBool)));
    if (mask == available.end()) continue;
    there.back() = mask->second.reshape({n});
    parts.back() = parts.back() * there.back().to(parts.back().scalar_type()).unsqueeze(-1);
    all = false;
  }
  return {parts.size() == 1 ? parts[0] : at::cat(parts, -1), all ? Tensor() : at::stack(there)};
}

Predicted WorldModel::Predict(const LatentState& state, const Tensor& action) const {
  return impl_->PredictFrom(impl_->ActionPart(action), state);
}

Tensor WorldModel::Reward(const LatentState& state) const {
  return PlannedReward(impl_->config.reward().transform(), impl_->PredictReward(Feature(state)).mean);
}

Tensor WorldModel::Continue(const LatentState& state) const {
  if (!impl_->config.has_continue_head()) return at::ones({state.stoch.size(0)}, impl_->options());
  return impl_->ContinueOf(Feature(state));
}

Tensor WorldModel::ActorOutputs(const LatentState& state) const {
  TORCH_CHECK(impl_->config.has_behavior(), "the model has no actor");
  return impl_->actor.out(impl_->actor.Feature(impl_->activation, Feature(state)));
}

Tensor WorldModel::Value(const LatentState& state) const {
  return impl_->ValueOf(Feature(state));
}

TensorMap WorldModel::Decode(const LatentState& state) const {
  const Tensor feature = Feature(state);
  TensorMap out;
  for (const ModalityNet& net : impl_->modalities) {
    const Tensor mean = impl_->DecodeOne(net, feature).mean;
    out.emplace(net.name, net.symlog ? Symexp(mean) : mean);
  }
  return out;
}

LossNoise WorldModel::DrawNoise(int64_t t, int64_t b, torch::Generator& generator, bool with_overshooting) const {
  const auto options = at::TensorOptions(at::kFloat).device(generator.device());
  const auto normal = [&](at::IntArrayRef shape) { return at::randn(shape, generator, options).to(impl_->options()); };
  const auto uniform = [&](at::IntArrayRef shape) { return at::rand(shape, generator, options).to(impl_->options()); };
  LossNoise noise;
  noise.posterior = normal({t, b, impl_->stoch});
  const int64_t distance = OvershootingDistance(impl_->config, with_overshooting);
  if (distance > 0) noise.overshooting = normal({distance + 1, t, b, impl_->stoch});
  if (HasMixture(impl_->config)) noise.component = uniform({t, b});
  if (impl_->config.modality_dropout() > 0)
    noise.dropout = uniform({t, b, static_cast<int64_t>(impl_->modalities.size())});
  return noise;
}

}  // namespace orrery
