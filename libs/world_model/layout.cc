#include "libs/world_model/layout.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace orrery {
namespace {

class Builder {
 public:
  void Linear(const std::string& name, int64_t in, int64_t out) { Layer(name, {out, in}, in, out); }
  void Conv(const std::string& name, int64_t in, int64_t out, int64_t kernel) {
    Layer(name, {out, in, kernel, kernel}, in * kernel * kernel, out);
  }
  // Torch takes the fan-in of a transposed convolution from its second dimension, the outputs.
  void Deconv(const std::string& name, int64_t in, int64_t out, int64_t kernel) {
    Layer(name, {in, out, kernel, kernel}, out * kernel * kernel, out);
  }
  void Gru(const std::string& name, int64_t in, int64_t hidden) {
    const double bound = 1 / std::sqrt(static_cast<double>(hidden));
    Add(name + ".weight_ih", {3 * hidden, in}, bound);
    Add(name + ".weight_hh", {3 * hidden, hidden}, bound);
    Add(name + ".bias_ih", {3 * hidden}, bound);
    Add(name + ".bias_hh", {3 * hidden}, bound);
  }
  // Hidden layers fc1, fc2, …; returns the width of the last one.
  int64_t Hidden(const std::string& name, int64_t in, int layers, int64_t width) {
    for (int i = 1; i <= layers; ++i, in = width) Linear(absl::StrCat(name, ".fc", i), in, width);
    return in;
  }
  std::vector<ParameterSpec> Take() { return std::move(specs_); }

 private:
  void Layer(const std::string& name, std::vector<int64_t> weight, int64_t fan_in, int64_t out) {
    const double bound = 1 / std::sqrt(static_cast<double>(fan_in));
    Add(name + ".weight", std::move(weight), bound);
    Add(name + ".bias", {out}, bound);
  }
  void Add(std::string name, std::vector<int64_t> shape, double bound) {
    specs_.push_back({std::move(name), std::move(shape), bound});
  }
  std::vector<ParameterSpec> specs_;
};

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
  for (int i = 1; i <= layers; ++i) {
    const int64_t out = i == layers ? image.channels() : static_cast<int64_t>(image.depth()) << (layers - 1 - i);
    const int64_t kernel = i > layers - 2 ? 6 : 5;
    decoder.Deconv(absl::StrCat("decoder.", m.name(), ".deconv", i), in, out, kernel);
    in = out;
  }
}

}  // namespace

std::vector<config::v1::Modality> ModalitiesByName(const config::v1::Model& model) {
  std::vector<config::v1::Modality> sorted(model.modalities().begin(), model.modalities().end());
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.name() < b.name(); });
  return sorted;
}

int ImageLayers(const config::v1::ImageModality& image) { return image.height() == 32 ? 3 : 4; }

int64_t EmbeddingSize(const config::v1::Modality& m) {
  if (m.has_image()) return (static_cast<int64_t>(m.image().depth()) << (ImageLayers(m.image()) - 1)) * 4;
  return m.vector().layers() == 0 ? m.vector().size() : m.vector().hidden_size();
}

std::vector<ParameterSpec> ParameterLayout(const config::v1::Model& model) {
  const int64_t d = model.deterministic_size(), s = model.stochastic_size(), u = model.hidden_size();
  Builder encoder, decoder, rest;
  int64_t embed = 0;
  for (const config::v1::Modality& m : ModalitiesByName(model)) {
    embed += EmbeddingSize(m);
    if (m.has_image()) {
      ImageParameters(m, d + s, encoder, decoder);
    } else {
      const auto& v = m.vector();
      encoder.Hidden("encoder." + m.name(), v.size(), v.layers(), v.hidden_size());
      const std::string name = "decoder." + m.name();
      decoder.Linear(name + ".out", decoder.Hidden(name, d + s, v.layers(), v.hidden_size()), v.size());
    }
  }
  rest.Linear("rssm.input", s + ActionSize(model), u);
  rest.Gru("rssm.gru", u, d);
  rest.Linear("rssm.prior.hidden", d, u);
  rest.Linear("rssm.prior.out", u, 2 * s);
  rest.Linear("rssm.posterior.hidden", d + embed, u);
  rest.Linear("rssm.posterior.out", u, 2 * s);
  rest.Linear("reward.out", rest.Hidden("reward", d + s, model.reward().layers(), model.reward().hidden_size()), 1);

  std::vector<ParameterSpec> all;
  for (Builder* part : {&encoder, &decoder, &rest})
    for (ParameterSpec& spec : part->Take()) all.push_back(std::move(spec));
  return all;
}

}  // namespace orrery
