#include <google/protobuf/descriptor.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "libs/base/status.h"
#include "libs/config/config.h"

namespace orrery {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

constexpr double kNoLimit = std::numeric_limits<double>::infinity();
constexpr double kMiB = 1 << 20;
constexpr size_t kMaxNameLength = 64;

// What the proto's comments state. `above`: the minimum itself is out of range.
struct Range {
  absl::string_view field;
  double min;
  double max = kNoLimit;
  bool above = false;
};

constexpr Range kRanges[] = {
    {"ContinuousAction.size", 1, 256},
    {"DiscreteAction.size", 2, 4096},
    {"ImageModality.channels", 1, 16},
    {"ImageModality.height", 32, 64},
    {"ImageModality.width", 32, 64},
    {"ImageModality.depth", 1, 256},
    {"ImageModality.bits", 1, 8},
    {"ImageModality.scale", 0},
    {"VectorModality.size", 1, 65536},
    {"VectorModality.layers", 0, 16},
    {"VectorModality.hidden_size", 1, 8192},
    {"VectorModality.scale", 0},
    {"RewardHead.layers", 0, 16},
    {"RewardHead.hidden_size", 1, 8192},
    {"Overshooting.distance", 0, 64},
    {"Overshooting.scale", 0},
    {"Overshooting.free_nats", 0},
    {"KlBalance.dynamics", 0},
    {"KlBalance.representation", 0},
    {"Objective.free_nats", 0},
    {"Objective.reward_scale", 0},
    {"Objective.kl_scale", 0},
    {"Model.deterministic_size", 1, 8192},
    {"Model.stochastic_size", 1, 4096},
    {"Model.hidden_size", 1, 8192},
    {"Model.min_std", 0, kNoLimit, true},
    {"Cem.horizon", 1, 256},
    {"Cem.iterations", 1, 256},
    {"Cem.candidates", 1, 65536},
    {"Cem.elites", 1, 65536},
    {"Cem.std_floor", 0},
    {"Environment.action_repeat", 1, 64},
    {"Environment.image_size", 32, 64},
    {"Environment.time_limit", 1, 1000000},
    {"Collection.seed_episodes", 0, 100000},
    {"Collection.exploration_noise", 0, 10},
    {"Collection.environments", 1, 1024},
    {"Collection.max_unacknowledged_bytes", kMiB},
    {"Collection.lease_seconds", 1, 86400},
    {"EarlyEnd.reward_below", -kNoLimit},
    {"EarlyEnd.failed_rows", 1, 1000000},
    {"Evaluation.every_episodes", 0},
    {"Evaluation.episodes", 1, 1000},
    {"Limiter.updates_per_row", 0, kNoLimit, true},
    {"Limiter.tolerance", 1},
    {"Limiter.absent_seconds", 1},
    {"Replay.max_rows", 1},
    {"Replay.max_bytes", kMiB},
    {"Replay.chunk_rows", 1, 1000},
    {"Replay.partitions", 1, 1024},
    {"Learning.batch_size", 1, 4096},
    {"Learning.sequence_length", 2, 1000},
    {"Learning.learning_rate", 0, kNoLimit, true},
    {"Learning.adam_epsilon", 0, kNoLimit, true},
    {"Learning.gradient_clip", 0, kNoLimit, true},
    {"Learning.updates_per_episode", 1},
    {"Learning.initial_updates", 0},
    {"Learning.max_episodes", 1},
    {"Learning.max_seconds", 1},
    {"Learning.snapshot_every_updates", 1},
    {"Learning.checkpoint_every_updates", 1},
    {"Learning.keep_checkpoints", 1, 1000},
    {"Learning.mirror_bytes", kMiB},
    {"PlannerService.max_batch", 1, 1024},
    {"PlannerService.max_delay_micros", 0, 1000000},
    {"PlannerService.max_queue", 1},
    {"Experiment.seed", 0},
};

std::string Text(const Range& range) {
  const auto number = [](double value) { return absl::StrCat(static_cast<int64_t>(value)); };
  if (range.min == -kNoLimit) return "a finite number";
  if (range.max != kNoLimit) return absl::StrCat(number(range.min), " to ", number(range.max));
  return absl::StrCat(range.above ? "above " : "at least ", number(range.min));
}

absl::Status Refused(absl::string_view path, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", problem));
}

double NumberOf(const Message& message, const FieldDescriptor* field) {
  const auto& reflection = *message.GetReflection();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return reflection.GetInt32(message, field);
    case FieldDescriptor::CPPTYPE_INT64:
      return static_cast<double>(reflection.GetInt64(message, field));
    case FieldDescriptor::CPPTYPE_FLOAT:
      return reflection.GetFloat(message, field);
    default:
      return reflection.GetDouble(message, field);
  }
}

absl::Status CheckNumber(const Message& message, const FieldDescriptor* field, const std::string& path) {
  absl::string_view name = field->full_name();
  absl::ConsumePrefix(&name, "orrery.config.v1.");
  const auto* range = std::find_if(std::begin(kRanges), std::end(kRanges), [&](auto& r) { return r.field == name; });
  if (range == std::end(kRanges)) return absl::InternalError(absl::StrCat(path, ": its range is not known"));
  const double value = NumberOf(message, field);
  const bool high_enough = range->above ? value > range->min : value >= range->min;
  if (high_enough && value <= range->max && std::isfinite(value)) return absl::OkStatus();
  std::string text;
  google::protobuf::TextFormat::PrintFieldValueToString(message, field, -1, &text);
  return Refused(path, absl::StrCat(text, " is out of range, expected ", Text(*range)));
}

absl::Status CheckEnum(const Message& message, const FieldDescriptor* field, const std::string& path) {
  const auto* value = message.GetReflection()->GetEnum(message, field);
  if (value->number() != 0) return absl::OkStatus();
  std::vector<std::string> names;
  for (int i = 0; i < field->enum_type()->value_count(); ++i) {
    if (field->enum_type()->value(i) != value) names.push_back(field->enum_type()->value(i)->name());
  }
  return Refused(path, absl::StrCat(value->name(), " is refused, expected ", absl::StrJoin(names, ", ")));
}

// Every number that is set lies in its range and every enum that is set has a meaning. Lists hold messages only.
absl::Status CheckFields(const Message& message, const std::string& prefix) {
  const auto& reflection = *message.GetReflection();
  std::vector<const FieldDescriptor*> fields;
  reflection.ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    const std::string path = absl::StrCat(prefix, field->name());
    if (field->is_repeated()) {
      for (int i = 0; i < reflection.FieldSize(message, field); ++i) {
        RETURN_IF_ERROR(
            CheckFields(reflection.GetRepeatedMessage(message, field, i), absl::StrCat(path, "[", i, "].")));
      }
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      RETURN_IF_ERROR(CheckFields(reflection.GetMessage(message, field), absl::StrCat(path, ".")));
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_ENUM) {
      RETURN_IF_ERROR(CheckEnum(message, field, path));
    } else if (field->cpp_type() != FieldDescriptor::CPPTYPE_STRING) {
      RETURN_IF_ERROR(CheckNumber(message, field, path));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckName(const std::string& name, absl::string_view punctuation, const std::string& path) {
  const bool valid = !name.empty() && name.size() <= kMaxNameLength && std::all_of(name.begin(), name.end(), [&](char c) {
    return absl::ascii_isalnum(c) || absl::StrContains(punctuation, c);
  });
  if (valid) return absl::OkStatus();
  return Refused(path, absl::StrCat("\"", name, "\" is refused, expected 1 to 64 letters, digits or any of ", punctuation));
}

absl::Status CheckImageSize(int size, const std::string& path) {
  if (size == 32 || size == 64) return absl::OkStatus();
  return Refused(path, absl::StrCat(size, " is out of range, expected 32 or 64"));
}

absl::Status CheckModality(const config::v1::Modality& modality, const std::string& path) {
  RETURN_IF_ERROR(CheckName(modality.name(), "_", path + ".name"));
  static constexpr absl::string_view kFields[] = {"action", "reward", "is_first", "is_terminal"};
  if (std::find(std::begin(kFields), std::end(kFields), modality.name()) != std::end(kFields)) {
    return Refused(path + ".name", absl::StrCat("\"", modality.name(), "\" is the name of another field of a row"));
  }
  switch (modality.kind_case()) {
    case config::v1::Modality::kImage: {
      RETURN_IF_ERROR(CheckImageSize(modality.image().height(), path + ".image.height"));
      if (modality.image().width() == modality.image().height()) return absl::OkStatus();
      return Refused(path + ".image.width", absl::StrCat(modality.image().width(), " is refused, expected the height, ",
                                                         modality.image().height()));
    }
    case config::v1::Modality::kVector:
      if (modality.vector().has_size()) return absl::OkStatus();
      return Refused(path + ".vector.size", "not set, expected 1 to 65536");
    case config::v1::Modality::KIND_NOT_SET:
      break;
  }
  return Refused(path, "no kind is set, expected image or vector");
}

absl::Status CheckAction(const config::v1::Action& action, const std::string& path) {
  if (action.has_continuous() && action.continuous().has_size()) return absl::OkStatus();
  if (action.has_discrete() && action.discrete().has_size()) return absl::OkStatus();
  return Refused(path, "not set, expected continuous { size } or discrete { size }");
}

absl::Status CheckModel(const config::v1::Model& model, bool complete, const std::string& prefix) {
  if (complete || model.has_action()) RETURN_IF_ERROR(CheckAction(model.action(), prefix + "action"));
  if (complete && model.modalities().empty()) return Refused(prefix + "modalities", "empty, expected at least one");
  std::set<std::string> names;
  for (int i = 0; i < model.modalities_size(); ++i) {
    const std::string path = absl::StrCat(prefix, "modalities[", i, "]");
    RETURN_IF_ERROR(CheckModality(model.modalities(i), path));
    if (!names.insert(model.modalities(i).name()).second) {
      return Refused(path + ".name", absl::StrCat("\"", model.modalities(i).name(), "\" is used twice"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPlanner(const config::v1::Planner& planner, const std::string& prefix) {
  const auto& cem = planner.cem();
  if (cem.elites() <= cem.candidates()) return absl::OkStatus();
  return Refused(prefix + "cem.elites", absl::StrCat(cem.elites(), " is out of range, expected 1 to the candidates, ",
                                                     cem.candidates()));
}

}  // namespace

absl::Status Validate(const config::v1::Experiment& experiment) {
  RETURN_IF_ERROR(CheckFields(experiment, ""));
  RETURN_IF_ERROR(CheckName(experiment.name(), "_-.", "name"));
  if (experiment.environment().task().empty()) return Refused("environment.task", "not set, expected the name of a task");
  RETURN_IF_ERROR(CheckImageSize(experiment.environment().image_size(), "environment.image_size"));
  RETURN_IF_ERROR(CheckModel(experiment.model(), false, "model."));
  RETURN_IF_ERROR(CheckPlanner(experiment.planner(), "planner."));
  const auto& service = experiment.planner_service();
  if (service.max_queue() >= service.max_batch()) return absl::OkStatus();
  return Refused("planner_service.max_queue", absl::StrCat(service.max_queue(), " is out of range, expected at least ",
                                                           "max_batch, ", service.max_batch()));
}

absl::Status Validate(const config::v1::Model& model, bool complete) {
  RETURN_IF_ERROR(CheckFields(model, ""));
  return CheckModel(model, complete, "");
}

absl::Status Validate(const config::v1::Planner& planner) {
  RETURN_IF_ERROR(CheckFields(planner, ""));
  return CheckPlanner(planner, "");
}

}  // namespace orrery
