// Fills what a configured model leaves to the environment.
#pragma once

#include "absl/status/statusor.h"
#include "libs/config/config.h"
#include "libs/envs/environment.h"

namespace orrery {

// Whether action, modalities or their sizes are unset, so that a specification is needed.
bool NeedsEnvironment(const config::v1::Model& model);

// The model with the action and modalities of the specification where it names none: an image for a uint8 [height, width,
// channels], a vector for a float32 [size]. Sizes that are unset are filled in. INVALID_ARGUMENT names the modality or
// action whose configured size is not the environment's, or that the environment does not have.
absl::StatusOr<config::v1::Model> CompleteModel(const config::v1::Model& model, const EnvironmentSpec& spec);

// The experiment with its model complete; makes its environment when the model leaves something open.
absl::StatusOr<config::v1::Experiment> CompleteExperiment(const config::v1::Experiment& experiment);

}  // namespace orrery
