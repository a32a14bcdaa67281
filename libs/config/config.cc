#include "libs/config/config.h"

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/config/text.h"

namespace orrery {
namespace {

template <typename T>
absl::StatusOr<T> Parse(const std::string& text) {
  T message;
  RETURN_IF_ERROR(ParseText(text, message));
  return message;
}

absl::Status Apply(const std::vector<std::string>& assignments, config::v1::Experiment& experiment) {
  for (const std::string& assignment : assignments) RETURN_IF_ERROR(SetField(experiment, assignment));
  return Validate(experiment);
}

}  // namespace

void FirstError::AddError(int line, google::protobuf::io::ColumnNumber column, const std::string& message) {
  if (!message_.empty()) return;
  message_ = message;
  text_ = absl::StrCat("line ", line + 1, ", column ", column + 1, ": ", message);
}

absl::Status ParseText(const std::string& text, google::protobuf::Message& message) {
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  if (parser.ParseFromString(text, &message)) return absl::OkStatus();
  return absl::InvalidArgumentError(error.text());
}

absl::StatusOr<config::v1::Experiment> ParseExperiment(const std::string& text) {
  return Parse<config::v1::Experiment>(text);
}

absl::StatusOr<config::v1::Model> ParseModel(const std::string& text) { return Parse<config::v1::Model>(text); }

absl::StatusOr<config::v1::Planner> ParsePlanner(const std::string& text) { return Parse<config::v1::Planner>(text); }

std::string ToText(const google::protobuf::Message& message) {
  std::string text;
  google::protobuf::TextFormat::PrintToString(message, &text);
  return text;
}

absl::StatusOr<config::v1::Experiment> LoadExperiment(const std::string& path,
                                                      const std::vector<std::string>& assignments) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  auto experiment = ParseExperiment(text);
  if (!experiment.ok()) return Annotate(experiment.status(), path);
  RETURN_IF_ERROR(Annotate(Apply(assignments, *experiment), path));
  return experiment;
}

std::vector<config::v1::Environment> TaskEnvironments(const config::v1::Environment& environment) {
  if (environment.tasks().empty()) return {environment};
  std::vector<config::v1::Environment> all;
  for (const config::v1::Task& task : environment.tasks()) {
    config::v1::Environment& one = all.emplace_back(environment);
    one.clear_tasks();
    one.set_task(task.name());
    if (task.has_action_repeat()) one.set_action_repeat(task.action_repeat());
    if (task.has_time_limit()) one.set_time_limit(task.time_limit());
  }
  return all;
}

double StepsPerRow(const config::v1::Environment& environment) {
  const std::vector<config::v1::Environment> tasks = TaskEnvironments(environment);
  double rows_per_step = 0;
  for (const config::v1::Environment& task : tasks) rows_per_step += 1.0 / task.action_repeat();
  return static_cast<double>(tasks.size()) / rows_per_step;
}

int ActionSize(const config::v1::Model& model) {
  return IsDiscrete(model) ? model.action().discrete().size() : model.action().continuous().size();
}

bool IsDiscrete(const config::v1::Model& model) { return model.action().has_discrete(); }

}  // namespace orrery
