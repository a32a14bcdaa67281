// Reads and validates an experiment.
//
// The generated classes of orrery.config.v1 are the options of the libraries: one definition with defaults and ranges.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "orrery/config/v1/experiment.pb.h"
#include "orrery/config/v1/model.pb.h"
#include "orrery/config/v1/planner.pb.h"

namespace orrery {

// Parses a text proto. INVALID_ARGUMENT with line and column for a syntax error or an unknown field or value.
absl::StatusOr<config::v1::Experiment> ParseExperiment(const std::string& text);
absl::StatusOr<config::v1::Model> ParseModel(const std::string& text);
absl::StatusOr<config::v1::Planner> ParsePlanner(const std::string& text);
// Text proto, one field per line; parses back to the same.
std::string ToText(const google::protobuf::Message& message);

// Sets one field: "learning.batch_size=16". The path names fields by '.', repeated ones as "model.modalities[0].name".
absl::Status SetField(config::v1::Experiment& experiment, const std::string& assignment);

// Reads `path`, applies the assignments in order, validates. Errors name the file.
absl::StatusOr<config::v1::Experiment> LoadExperiment(const std::string& path,
                                                      const std::vector<std::string>& assignments = {});

// INVALID_ARGUMENT naming the field by its path, its value and the range.
absl::Status Validate(const config::v1::Experiment& experiment);
// For a model in a snapshot `complete` is true: action and modalities must be there.
absl::Status Validate(const config::v1::Model& model, bool complete);
absl::Status Validate(const config::v1::Planner& planner);

// One environment for each task, in the configuration's order, with `task` and whatever `tasks` says of it. At least one.
std::vector<config::v1::Environment> TaskEnvironments(const config::v1::Environment& environment);
// Simulator steps of a row, averaged over tasks that are played equally often and for equally many simulator steps.
double StepsPerRow(const config::v1::Environment& environment);

// Dimensions of the action vector: size of a continuous one, choices of a discrete one. The model must be complete.
int ActionSize(const config::v1::Model& model);
bool IsDiscrete(const config::v1::Model& model);

}  // namespace orrery
