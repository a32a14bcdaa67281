#include "tools/orrery/inspect_files.h"

#include <ATen/CPUGeneratorImpl.h>

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "libs/base/array.h"
#include "libs/base/status.h"
#include "libs/tensors/safetensors.h"

namespace orrery {

using torch::Tensor;

namespace {

absl::Status Preprocess(const WorldModel& model, const config::v1::Modality& modality, const InspectNoise& noise, Tensor& x) {
  if (!modality.has_image() || x.scalar_type() != at::kByte) return absl::OkStatus();
  const auto& image = modality.image();
  const auto is = [&](std::vector<int64_t> shape) { return x.dim() == 5 && x.sizes().slice(2) == at::IntArrayRef(shape); };
  if (is({image.channels(), image.height(), image.width()})) {
    x = x.movedim(2, -1);
  } else if (!is({image.height(), image.width(), image.channels()})) {
    return absl::InvalidArgumentError(absl::StrCat(modality.name(), " is uint8 ", ShapeString(x.sizes().vec()),
                                                   "; expected [T, B, ", image.height(), ", ", image.width(), ", ",
                                                   image.channels(), "]"));
  }
  x = model.Preprocess({{modality.name(), x}}, noise.generator).at(modality.name());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<InspectNoise> OpenNoise(const std::string& text) {
  InspectNoise noise;
  uint64_t seed = 0;
  if (text == "zero") return noise;
  if (absl::SimpleAtoi(text, &seed)) {
    noise.generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    return noise;
  }
  ASSIGN_OR_RETURN(SafeTensors file, LoadSafeTensors(text));
  noise.file = std::move(file.tensors);
  return noise;
}

absl::StatusOr<Tensor> TakeNoise(InspectNoise& noise, const std::string& name, std::vector<int64_t> shape, bool uniform) {
  if (noise.generator.has_value()) {
    return uniform ? at::rand(shape, noise.generator, at::kFloat) : at::randn(shape, noise.generator, at::kFloat);
  }
  if (!noise.file.has_value()) return at::zeros(shape);
  const Tensor x = FindTensor(*noise.file, name);
  if (x.defined() && x.scalar_type() == at::kFloat && x.sizes() == at::IntArrayRef(shape)) return x;
  const std::string actual =
      x.defined() ? absl::StrCat(at::toString(x.scalar_type()), " ", ShapeString(x.sizes().vec())) : "missing";
  return absl::InvalidArgumentError(
      absl::StrCat("noise ", name, " is ", actual, "; expected Float ", ShapeString(shape)));
}

Tensor FindTensor(const TensorMap& tensors, const std::string& name) {
  const auto it = tensors.find(name);
  return it == tensors.end() ? Tensor() : it->second;
}

absl::Status CheckLeading(const Tensor& x, int64_t dims, absl::string_view name, const std::string& path) {
  if (x.defined() && x.dim() == dims && x.numel() > 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", name, " is missing, empty or not of ", dims, " dimensions"));
}

absl::StatusOr<Batch> LoadBatch(const std::string& path, const WorldModel& model, const InspectNoise& noise) {
  ASSIGN_OR_RETURN(const SafeTensors file, LoadSafeTensors(path));
  const Tensor action = FindTensor(file.tensors, "action");
  const bool one_episode = action.defined() && action.dim() == 2;
  const auto find = [&](const std::string& name) {
    const Tensor x = FindTensor(file.tensors, name);
    return one_episode && x.defined() && x.dim() > 0 ? x.unsqueeze(1) : x;
  };
  Batch batch;
  batch.action = find("action");
  batch.reward = find("reward");
  batch.is_first = find("is_first");
  batch.is_terminal = find("is_terminal");
  for (const auto& modality : model.config().modalities()) {
    Tensor x = find(modality.name());
    if (!x.defined()) return absl::InvalidArgumentError(absl::StrCat(path, ": ", modality.name(), " is missing"));
    RETURN_IF_ERROR(Annotate(Preprocess(model, modality, noise, x), path));
    batch.observations.emplace(modality.name(), x);
    if (const Tensor there = find("available." + modality.name()); there.defined())
      batch.available.emplace(modality.name(), there);
  }
  return batch;
}

}  // namespace orrery
