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
constexpr int kMostExperts = 8;  // 255 subsets

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
    {"ImageModality.height", 32, 128},
    {"ImageModality.width", 32, 128},
    {"ImageModality.depth", 1, 256},
    {"ImageModality.bits", 1, 8},
    {"ImageModality.scale", 0},
    {"VectorModality.size", 1, 65536},
    {"VectorModality.layers", 0, 16},
    {"VectorModality.hidden_size", 1, 8192},
    {"VectorModality.scale", 0},
    {"VectorModality.decoder_layers", 0, 16},
    {"VectorModality.decoder_hidden_size", 1, 8192},
    {"RewardHead.layers", 0, 16},
    {"RewardHead.hidden_size", 1, 8192},
    {"ContinueHead.layers", 0, 16},
    {"ContinueHead.hidden_size", 1, 8192},
    {"Categorical.groups", 1, 256},
    {"Categorical.classes", 2, 256},
    {"Categorical.uniform_mix", 0, 0.5},
    {"DistanceWeight.weight", 0},
    {"ObservationOvershooting.distance", 0, 64},
    {"ObservationOvershooting.scale", 0},
    {"Overshooting.distance", 0, 64},
    {"Overshooting.scale", 0},
    {"Overshooting.free_nats", 0},
    {"KlBalance.dynamics", 0},
    {"KlBalance.representation", 0},
    {"Behavior.horizon", 1, 256},
    {"Behavior.discount", 0, 1},
    {"Behavior.lambda", 0, 1},
    {"Behavior.actor_layers", 0, 16},
    {"Behavior.actor_hidden_size", 1, 8192},
    {"Behavior.value_layers", 0, 16},
    {"Behavior.value_hidden_size", 1, 8192},
    {"Behavior.init_std", 0, kNoLimit, true},
    {"Behavior.entropy_scale", 0},
    {"Objective.free_nats", 0},
    {"Objective.reward_scale", 0},
    {"Objective.kl_scale", 0},
    {"Objective.global_prior_scale", 0},
    {"Objective.continue_scale", 0},
    {"Model.deterministic_size", 1, 8192},
    {"Model.stochastic_size", 1, 4096},
    {"Model.hidden_size", 1, 8192},
    {"Model.min_std", 0, kNoLimit, true},
    {"Model.modality_dropout", 0, 0.99},
    {"Cem.horizon", 1, 256},
    {"Cem.iterations", 1, 256},
    {"Cem.candidates", 1, 65536},
    {"Cem.elites", 1, 65536},
    {"Cem.std_floor", 0},
    {"Cem.momentum", 0, 1},
    {"Cem.proposals", 0, 65536},
    {"Cem.discount", 0, 1},
    {"Cem.early_stop_std", 0},
    {"Icem.horizon", 1, 256},
    {"Icem.iterations", 1, 256},
    {"Icem.candidates", 1, 65536},
    {"Icem.elites", 1, 65536},
    {"Icem.noise_beta", 0, 10},
    {"Icem.candidates_decay", 1},
    {"Icem.kept_elites", 0, 1},
    {"Icem.momentum", 0, 1},
    {"Icem.initial_std", 0, kNoLimit, true},
    {"Icem.discount", 0, 1},
    {"Mppi.horizon", 1, 256},
    {"Mppi.iterations", 1, 256},
    {"Mppi.candidates", 1, 65536},
    {"Mppi.elites", 1, 65536},
    {"Mppi.temperature", 0, kNoLimit, true},
    {"Mppi.min_std", 0},
    {"Mppi.max_std", 0, kNoLimit, true},
    {"Mppi.discount", 0, 1},
    {"Mppi.proposals", 0, 65536},
    {"Genetic.horizon", 1, 256},
    {"Genetic.generations", 1, 256},
    {"Genetic.population", 2, 4096},
    {"Genetic.simulations", 1, 1000},
    {"Genetic.mutation_probability", 0, 1},
    {"Genetic.mutation_std", 0},
    {"Genetic.discount", 0, 1},
    {"RandomShooting.horizon", 1, 256},
    {"RandomShooting.candidates", 1, 65536},
    {"RandomShooting.discount", 0, 1},
    {"Task.action_repeat", 1, 64},
    {"Task.time_limit", 1, 1000000},
    {"Environment.action_repeat", 1, 64},
    {"Environment.image_size", 32, 128},
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
    {"RateSchedule.warm_up_updates", 0, 1000000000},
    {"RateSchedule.decay_updates", 1, 1000000000},
    {"RateSchedule.final_fraction", 0, 1},
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
    {"Learning.actor_learning_rate", 0, kNoLimit, true},
    {"Learning.value_learning_rate", 0, kNoLimit, true},
    {"Learning.weight_average_decay", 0, 1},
    {"Learning.snapshot_every_seconds", 0, kNoLimit, true},
    {"Learning.max_updates", 1},
    {"PlannerService.max_batch", 1, 1024},
    {"PlannerService.max_delay_micros", 0, 1000000},
    {"PlannerService.max_queue", 1},
    {"Experiment.seed", 0},
};

std::string Text(const Range& range) {
  const auto number = [](double value) {
    return value == std::floor(value) ? absl::StrCat(static_cast<int64_t>(value)) : absl::StrCat(value);
  };
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
    } else if (field->cpp_type() != FieldDescriptor::CPPTYPE_STRING &&
               field->cpp_type() != FieldDescriptor::CPPTYPE_BOOL) {
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

absl::Status CheckModality(const config::v1::Modality& modality, const std::string& path) {
  RETURN_IF_ERROR(CheckName(modality.name(), "_", path + ".name"));
  static constexpr absl::string_view kFields[] = {"action", "reward", "is_first", "is_terminal"};
  if (std::find(std::begin(kFields), std::end(kFields), modality.name()) != std::end(kFields)) {
    return Refused(path + ".name", absl::StrCat("\"", modality.name(), "\" is the name of another field of a row"));
  }
  switch (modality.kind_case()) {
    case config::v1::Modality::kImage:
      if (modality.image().width() == modality.image().height()) return absl::OkStatus();
      return Refused(path + ".image.width", absl::StrCat(modality.image().width(), " is refused, expected the height, ",
                                                         modality.image().height()));
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

// Features that exclude each other.
absl::Status CheckFeatures(const config::v1::Model& model, const std::string& prefix) {
  using config::v1::Model;
  const bool experts = model.posterior() != Model::JOINT;
  if (model.has_categorical() && experts)
    return Refused(prefix + "posterior", "experts need a Gaussian state, expected JOINT with categorical");
  if (model.has_categorical() && model.latent() == Model::RNN)
    return Refused(prefix + "latent", "RNN has no samples, expected RSSM or SSM with categorical");
  if (experts && model.modalities_size() > kMostExperts)
    return Refused(prefix + "modalities", absl::StrCat(model.modalities_size(), " are too many for experts, expected at most ",
                                                       kMostExperts));
  if (model.reward().output() != config::v1::RewardHead::TWO_HOT) return absl::OkStatus();
  if (model.reward().transform() != config::v1::RewardHead::NONE)
    return Refused(prefix + "reward.transform", "TWO_HOT bins are those of the reward itself, expected NONE");
  if (model.reward().variance() != config::v1::UNIT)
    return Refused(prefix + "reward.variance", "TWO_HOT has no deviation, expected UNIT");
  return absl::OkStatus();
}

absl::Status CheckModel(const config::v1::Model& model, bool complete, const std::string& prefix) {
  RETURN_IF_ERROR(CheckFeatures(model, prefix));
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

absl::Status CheckElites(int elites, int candidates, const std::string& path) {
  if (elites <= candidates) return absl::OkStatus();
  return Refused(path, absl::StrCat(elites, " is out of range, expected 1 to the candidates, ", candidates));
}

absl::Status CheckProposals(int proposals, int candidates, const std::string& path) {
  if (proposals <= candidates) return absl::OkStatus();
  return Refused(path, absl::StrCat(proposals, " is out of range, expected 0 to the candidates, ", candidates));
}

absl::Status CheckMomentum(float momentum, const std::string& path) {
  if (momentum < 1) return absl::OkStatus();
  return Refused(path, absl::StrCat(momentum, " is out of range, expected below 1"));
}

absl::Status CheckPlanner(const config::v1::Planner& planner, const std::string& prefix) {
  const auto& cem = planner.cem();
  const auto& icem = planner.icem();
  const auto& mppi = planner.mppi();
  RETURN_IF_ERROR(CheckElites(cem.elites(), cem.candidates(), prefix + "cem.elites"));
  RETURN_IF_ERROR(CheckElites(icem.elites(), icem.candidates(), prefix + "icem.elites"));
  RETURN_IF_ERROR(CheckElites(mppi.elites(), mppi.candidates(), prefix + "mppi.elites"));
  RETURN_IF_ERROR(CheckProposals(cem.proposals(), cem.candidates(), prefix + "cem.proposals"));
  RETURN_IF_ERROR(CheckProposals(mppi.proposals(), mppi.candidates(), prefix + "mppi.proposals"));
  RETURN_IF_ERROR(CheckMomentum(cem.momentum(), prefix + "cem.momentum"));
  RETURN_IF_ERROR(CheckMomentum(icem.momentum(), prefix + "icem.momentum"));
  if (mppi.min_std() <= mppi.max_std()) return absl::OkStatus();
  return Refused(prefix + "mppi.min_std",
                 absl::StrCat(mppi.min_std(), " is out of range, expected 0 to max_std, ", mppi.max_std()));
}

absl::Status CheckLearning(const config::v1::Learning& learning) {
  const config::v1::RateSchedule& schedule = learning.rate_schedule();
  if (schedule.shape() != config::v1::RateSchedule::CONSTANT && !schedule.has_decay_updates()) {
    return Refused("learning.rate_schedule.decay_updates",
                   absl::StrCat("not set, expected 1 to 1000000000 with ",
                                config::v1::RateSchedule::Shape_Name(schedule.shape())));
  }
  if (learning.weight_average_decay() < 1) return absl::OkStatus();
  return Refused("learning.weight_average_decay",
                 absl::StrCat(learning.weight_average_decay(), " is out of range, expected below 1"));
}

absl::Status CheckTasks(const config::v1::Environment& environment) {
  if (environment.tasks().empty()) {
    return environment.task().empty() ? Refused("environment.task", "not set, expected the name of a task") : absl::OkStatus();
  }
  if (environment.has_task()) {
    return Refused("environment.task", absl::StrCat("\"", environment.task(), "\" is set beside tasks, expected one of the two"));
  }
  std::set<std::string> names;
  for (int i = 0; i < environment.tasks_size(); ++i) {
    const std::string& name = environment.tasks(i).name();
    const std::string path = absl::StrCat("environment.tasks[", i, "].name");
    if (name.empty()) return Refused(path, "not set, expected the name of a task");
    if (!names.insert(name).second) return Refused(path, absl::StrCat("\"", name, "\" is used twice"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Validate(const config::v1::Experiment& experiment) {
  RETURN_IF_ERROR(CheckFields(experiment, ""));
  RETURN_IF_ERROR(CheckName(experiment.name(), "_-.", "name"));
  RETURN_IF_ERROR(CheckTasks(experiment.environment()));
  RETURN_IF_ERROR(CheckModel(experiment.model(), false, "model."));
  RETURN_IF_ERROR(CheckPlanner(experiment.planner(), "planner."));
  RETURN_IF_ERROR(CheckLearning(experiment.learning()));
  const auto& service = experiment.planner_service();
  if (!service.has_max_queue() || service.max_queue() >= service.max_batch()) return absl::OkStatus();
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
