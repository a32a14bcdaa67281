#include "libs/world_model/layout.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace orrery {
namespace {

class Builder {
 public:
  explicit Builder(const config::v1::Model& model)
      : glorot_(model.initialization() == config::v1::Model::GLOROT), norm_(model.layer_norm()) {}

  void Linear(const std::string& name, int64_t in, int64_t out) { Layer(name, {out, in}, in, out); }
  // A layer with an activation after it.
  void HiddenLayer(const std::string& name, int64_t in, int64_t out) {
    Linear(name, in, out);
    if (norm_) Norm(name, out);
  }
  // An output that begins as zero whatever its input.
  void Zero(const std::string& name, int64_t in, int64_t out) {
    Add(name + ".weight", {out, in}, 0);
    Add(name + ".bias", {out}, 0);
  }
  void Conv(const std::string& name, int64_t in, int64_t out, int64_t kernel) {
    Layer(name, {out, in, kernel, kernel}, in * kernel * kernel, out * kernel * kernel);
  }
  // Torch takes the fan-in of a transposed convolution from its second dimension, the outputs.
  void Deconv(const std::string& name, int64_t in, int64_t out, int64_t kernel) {
    Layer(name, {in, out, kernel, kernel}, out * kernel * kernel, in * kernel * kernel, out);
  }
  void Gru(const std::string& name, int64_t in, int64_t hidden) {
    const double torch = 1 / std::sqrt(static_cast<double>(hidden));
    Add(name + ".weight_ih", {3 * hidden, in}, glorot_ ? Glorot(in, hidden) : torch);
    Add(name + ".weight_hh", {3 * hidden, hidden}, glorot_ ? Glorot(hidden, hidden) : torch);
    Add(name + ".bias_ih", {3 * hidden}, glorot_ ? 0 : torch);
    Add(name + ".bias_hh", {3 * hidden}, glorot_ ? 0 : torch);
    if (norm_) Norm(name, 3 * hidden);
  }
  // One number, zero.
  void Scalar(const std::string& name) { Add(name, {}, 0); }
  // Hidden layers fc1, fc2, …; returns the width of the last one.
  int64_t Hidden(const std::string& name, int64_t in, int layers, int64_t width) {
    for (int i = 1; i <= layers; ++i, in = width) HiddenLayer(absl::StrCat(name, ".fc", i), in, width);
    return in;
  }
  std::vector<ParameterSpec> Take() { return std::move(specs_); }

 private:
  static double Glorot(int64_t fan_in, int64_t fan_out) { return std::sqrt(6.0 / static_cast<double>(fan_in + fan_out)); }
  void Layer(const std::string& name, std::vector<int64_t> weight, int64_t fan_in, int64_t fan_out, int64_t out = 0) {
    if (out == 0) out = weight[0];
    const double torch = 1 / std::sqrt(static_cast<double>(fan_in));
    Add(name + ".weight", std::move(weight), glorot_ ? Glorot(fan_in, fan_out) : torch);
    Add(name + ".bias", {out}, glorot_ ? 0 : torch);
  }
  void Norm(const std::string& name, int64_t size) {
    Add(name + ".norm.weight", {size}, 0, 1);
    Add(name + ".norm.bias", {size}, 0);
  }
  void Add(std::string name, std::vector<int64_t> shape, double bound, double center = 0) {
    specs_.push_back({std::move(name), std::move(shape), bound, center});
  }
  const bool glorot_, norm_;
  std::vector<ParameterSpec> specs_;
};

// Side after one convolution of kernel 4 and stride 2.
int Halved(int side) { return side < 4 ? 0 : (side - 4) / 2 + 1; }

// Kernels of the transposed convolutions of stride 2 that lead from 1×1 to the picture, the first one first: 6 where the side
// that comes out is even, 5 where it is odd, and the first one's is its side. 5, 5, 6, 6 at 64 (PlaNet).
std::vector<int> DecoderKernels(const config::v1::ImageModality& image) {
  std::vector<int> kernels(ImageLayers(image));
  int side = image.height();
  for (size_t i = kernels.size(); i-- > 1; side = (side - kernels[i]) / 2 + 1) kernels[i] = side % 2 == 0 ? 6 : 5;
  kernels[0] = side;
  return kernels;
}

void ImageParameters(const config::v1::Modality& m, int64_t feature, Builder& encoder, Builder& decoder) {
  const auto& image = m.image();
  const int layers = ImageLayers(image);
  int64_t in = image.channels();
  for (int i = 1; i <= layers; ++i) {
    const int64_t out = static_cast<int64_t>(image.depth()) << (i - 1);
    encoder.Conv(absl::StrCat("encoder.", m.name(), ".conv", i), in, out, 4);
    in = out;
  }
  in = EmbeddingSize(m);
  decoder.Linear(absl::StrCat("decoder.", m.name(), ".input"), feature, in);
  const std::vector<int> kernels = DecoderKernels(image);
  for (int i = 1; i <= layers; ++i) {
    const int64_t out = i == layers ? image.channels() : static_cast<int64_t>(image.depth()) << (layers - 1 - i);
    const int64_t kernel = kernels[i - 1];
    decoder.Deconv(absl::StrCat("decoder.", m.name(), ".deconv", i), in, out, kernel);
    const std::string std = absl::StrCat("decoder.", m.name(), ".std");
    if (i == layers && image.variance() == config::v1::PER_OUTPUT) decoder.Deconv(std, in, out, kernel);
    if (i == layers && image.variance() == config::v1::SHARED) decoder.Scalar(std);
    in = out;
  }
}

void VectorParameters(const config::v1::Modality& m, int64_t feature, Builder& encoder, Builder& decoder) {
  const auto& v = m.vector();
  encoder.Hidden("encoder." + m.name(), v.size(), v.layers(), v.hidden_size());
  const std::string name = "decoder." + m.name();
  const int64_t last = decoder.Hidden(name, feature, DecoderLayers(v), DecoderWidth(v));
  decoder.Linear(name + ".out", last, v.size());
  if (v.variance() == config::v1::PER_OUTPUT) decoder.Linear(name + ".std", last, v.size());
  if (v.variance() == config::v1::SHARED) decoder.Scalar(name + ".std");
}

void DynamicsParameters(const config::v1::Model& model, int64_t d, int64_t s, Builder& rest) {
  const int64_t u = model.hidden_size(), a = ActionSize(model), out = model.has_categorical() ? s : 2 * s;
  const bool ssm = model.latent() == config::v1::Model::SSM;
  if (!ssm) {
    rest.HiddenLayer("rssm.input", s + a, u);
    rest.Gru("rssm.gru", u, d);
  }
  rest.HiddenLayer("rssm.prior.hidden", ssm ? s + a : d, u);
  rest.Linear("rssm.prior.out", u, out);
  const int64_t predicted = ssm ? out : d;
  const auto expert = [&](const std::string& name, int64_t embed) {
    rest.HiddenLayer(name + ".hidden", predicted + embed, u);
    rest.Linear(name + ".out", u, out);
  };
  int64_t embed = 0;
  for (const config::v1::Modality& m : ModalitiesByName(model)) {
    if (HasExperts(model)) expert("rssm.posterior." + m.name(), EmbeddingSize(m));
    embed += EmbeddingSize(m);
  }
  if (!HasExperts(model)) expert("rssm.posterior", embed);
}

void HeadParameters(const config::v1::Model& model, int64_t feature, Builder& rest) {
  const auto& reward = model.reward();
  const int64_t last = rest.Hidden("reward", feature, reward.layers(), reward.hidden_size());
  if (reward.output() == config::v1::RewardHead::TWO_HOT) {
    rest.Zero("reward.out", last, kTwoHotBins);
  } else {
    rest.Linear("reward.out", last, 1);
    if (reward.variance() == config::v1::PER_OUTPUT) rest.Linear("reward.std", last, 1);
    if (reward.variance() == config::v1::SHARED) rest.Scalar("reward.std");
  }
  if (!model.has_continue_head()) return;
  const auto& head = model.continue_head();
  rest.Linear("continue.out", rest.Hidden("continue", feature, head.layers(), head.hidden_size()), 1);
}

}  // namespace

std::vector<config::v1::Modality> ModalitiesByName(const config::v1::Model& model) {
  std::vector<config::v1::Modality> sorted(model.modalities().begin(), model.modalities().end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.name() < b.name(); });
  return sorted;
}

int ImageLayers(const config::v1::ImageModality& image) {
  int layers = 0;
  for (int side = image.height(); Halved(side) > 0; side = Halved(side)) ++layers;
  return layers;
}

int64_t EmbeddingSize(const config::v1::Modality& m) {
  if (m.has_image()) {
    int64_t side = m.image().height();
    for (int i = ImageLayers(m.image()); i > 0; --i) side = Halved(static_cast<int>(side));
    return (static_cast<int64_t>(m.image().depth()) << (ImageLayers(m.image()) - 1)) * side * side;
  }
  return m.vector().layers() == 0 ? m.vector().size() : m.vector().hidden_size();
}

namespace {

void BehaviorParameters(const config::v1::Model& model, int64_t feature, Builder& rest) {
  if (!model.has_behavior()) return;
  const auto& b = model.behavior();
  const int64_t actions = IsDiscrete(model) ? ActionSize(model) : 2 * ActionSize(model);
  rest.Linear("actor.out", rest.Hidden("actor", feature, b.actor_layers(), b.actor_hidden_size()), actions);
  rest.Linear("value.out", rest.Hidden("value", feature, b.value_layers(), b.value_hidden_size()), 1);
}

}  // namespace

int DecoderLayers(const config::v1::VectorModality& v) { return v.has_decoder_layers() ? v.decoder_layers() : v.layers(); }
int64_t DecoderWidth(const config::v1::VectorModality& v) {
  return v.has_decoder_hidden_size() ? v.decoder_hidden_size() : v.hidden_size();
}

int64_t StochasticSize(const config::v1::Model& model) {
  if (!model.has_categorical()) return model.stochastic_size();
  return static_cast<int64_t>(model.categorical().groups()) * model.categorical().classes();
}
int64_t DeterministicSize(const config::v1::Model& model) {
  return model.latent() == config::v1::Model::SSM ? 0 : model.deterministic_size();
}
bool HasMixture(const config::v1::Model& model) {
  const auto kind = model.posterior();
  return (kind == config::v1::Model::MOE || kind == config::v1::Model::MOPOE) && model.modalities_size() > 1;
}
bool HasExperts(const config::v1::Model& model) { return model.posterior() != config::v1::Model::JOINT; }

int64_t OvershootingDistance(const config::v1::Model& model, bool all) {
  const auto& objective = model.objective();
  const auto counts = [&](int64_t distance, double scale) { return all || scale > 0 ? distance : 0; };
  int64_t latent = counts(objective.overshooting().distance(), objective.overshooting().scale());
  if (latent < 2) latent = 0;
  const auto& observed = objective.observation_overshooting();
  return std::max<int64_t>(latent, objective.has_observation_overshooting() ? counts(observed.distance(), observed.scale()) : 0);
}

std::vector<ParameterSpec> ParameterLayout(const config::v1::Model& model) {
  const int64_t d = DeterministicSize(model), s = StochasticSize(model);
  Builder encoder(model), decoder(model), rest(model);
  for (const config::v1::Modality& m : ModalitiesByName(model)) {
    if (m.has_image()) {
      ImageParameters(m, d + s, encoder, decoder);
    } else {
      VectorParameters(m, d + s, encoder, decoder);
    }
  }
  DynamicsParameters(model, d, s, rest);
  HeadParameters(model, d + s, rest);
  BehaviorParameters(model, d + s, rest);

  std::vector<ParameterSpec> all;
  for (Builder* part : {&encoder, &decoder, &rest})
    for (ParameterSpec& spec : part->Take()) all.push_back(std::move(spec));
  return all;
}

}  // namespace orrery
