#include "libs/learning/complete_model.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "libs/base/status.h"
#include "libs/envs/tasks.h"

namespace orrery {
namespace {

using config::v1::ImageModality;
using config::v1::Modality;
using config::v1::Model;
using config::v1::VectorModality;

bool IsImage(const TensorSpec& spec) { return spec.dtype == DType::kUInt8 && spec.shape.size() == 3; }
bool IsVector(const TensorSpec& spec) { return spec.dtype == DType::kFloat32 && spec.shape.size() == 1; }

absl::Status Mismatch(const std::string& name, absl::string_view configured, const TensorSpec& spec) {
  return absl::InvalidArgumentError(absl::StrCat("modality \"", name, "\" is configured as ", configured,
                                                 ", the environment delivers ", Name(spec.dtype), " ",
                                                 ShapeString(spec.shape)));
}

absl::Status CompleteImage(const TensorSpec& spec, ImageModality& image) {
  if (!IsImage(spec)) return Mismatch(spec.name, "an image", spec);
  if (!image.has_height()) image.set_height(static_cast<int>(spec.shape[0]));
  if (!image.has_width()) image.set_width(static_cast<int>(spec.shape[1]));
  if (!image.has_channels()) image.set_channels(static_cast<int>(spec.shape[2]));
  const std::vector<int64_t> shape = {image.height(), image.width(), image.channels()};
  if (shape != spec.shape) return Mismatch(spec.name, absl::StrCat("an image ", ShapeString(shape)), spec);
  return absl::OkStatus();
}

absl::Status CompleteVector(const TensorSpec& spec, VectorModality& vector) {
  if (!IsVector(spec)) return Mismatch(spec.name, "a vector", spec);
  if (!vector.has_size()) vector.set_size(static_cast<int>(spec.shape[0]));
  if (vector.size() != spec.shape[0]) {
    return Mismatch(spec.name, absl::StrCat("a vector [", vector.size(), "]"), spec);
  }
  return absl::OkStatus();
}

absl::Status CompleteModality(const EnvironmentSpec& spec, Modality& modality) {
  const auto found = std::find_if(spec.observations.begin(), spec.observations.end(),
                                  [&](const TensorSpec& tensor) { return tensor.name == modality.name(); });
  if (found == spec.observations.end()) {
    std::vector<std::string> names;
    for (const TensorSpec& tensor : spec.observations) names.push_back(tensor.name);
    return absl::InvalidArgumentError(absl::StrCat("modality \"", modality.name(), "\" is not among the environment's: ",
                                                   absl::StrJoin(names, ", ")));
  }
  if (modality.has_image()) return CompleteImage(*found, *modality.mutable_image());
  return CompleteVector(*found, *modality.mutable_vector());
}

absl::Status CompleteAction(const ActionSpec& spec, config::v1::Action& action) {
  if (action.kind_case() == config::v1::Action::KIND_NOT_SET) {
    if (spec.discrete) {
      action.mutable_discrete();
    } else {
      action.mutable_continuous();
    }
  }
  if (action.has_continuous() && !action.continuous().has_size()) action.mutable_continuous()->set_size(spec.size);
  if (action.has_discrete() && !action.discrete().has_size()) action.mutable_discrete()->set_size(spec.size);
  const int size = action.has_discrete() ? action.discrete().size() : action.continuous().size();
  if (action.has_discrete() != spec.discrete || size != spec.size) {
    return absl::InvalidArgumentError(absl::StrCat("action is configured as ",
                                                   action.has_discrete() ? "discrete " : "continuous ", size,
                                                   ", the environment takes ", spec.discrete ? "discrete " : "continuous ",
                                                   spec.size));
  }
  return absl::OkStatus();
}

}  // namespace

bool NeedsEnvironment(const Model& model) {
  const config::v1::Action& action = model.action();
  const bool has_action = (action.has_continuous() && action.continuous().has_size()) ||
                          (action.has_discrete() && action.discrete().has_size());
  const auto has_sizes = [](const Modality& modality) {
    const ImageModality& image = modality.image();
    return modality.has_image() ? image.has_height() && image.has_width() && image.has_channels()
                                : modality.vector().has_size();
  };
  return !has_action || model.modalities().empty() ||
         !std::all_of(model.modalities().begin(), model.modalities().end(), has_sizes);
}

absl::StatusOr<Model> CompleteModel(const Model& model, const EnvironmentSpec& spec) {
  Model complete = model;
  if (complete.modalities().empty()) {
    for (const TensorSpec& tensor : spec.observations) {
      Modality& modality = *complete.add_modalities();
      modality.set_name(tensor.name);
      if (IsImage(tensor)) {
        modality.mutable_image();
      } else {
        modality.mutable_vector();
      }
    }
  }
  for (Modality& modality : *complete.mutable_modalities()) RETURN_IF_ERROR(CompleteModality(spec, modality));
  RETURN_IF_ERROR(CompleteAction(spec.action, *complete.mutable_action()));
  RETURN_IF_ERROR(Annotate(Validate(complete, /*complete=*/true), "model"));
  return complete;
}

absl::StatusOr<config::v1::Experiment> CompleteExperiment(const config::v1::Experiment& experiment) {
  config::v1::Experiment complete = experiment;
  if (!NeedsEnvironment(experiment.model())) return complete;
  ASSIGN_OR_RETURN(const std::vector<EnvironmentOptions> tasks, TaskOptions(experiment.environment()));
  ASSIGN_OR_RETURN(const std::unique_ptr<Environment> made, MakeEnvironment(tasks[0]));
  ASSIGN_OR_RETURN(*complete.mutable_model(), CompleteModel(experiment.model(), made->spec()));
  return complete;
}

}  // namespace orrery
