#include <google/protobuf/descriptor.h>

#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "libs/base/status.h"
#include "libs/config/config.h"
#include "libs/config/text.h"

namespace orrery {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

// One part of a path: "modalities[0]" is the field and 0; without brackets the index is -1.
struct Step {
  const FieldDescriptor* field = nullptr;
  int index = -1;
};

std::string FieldNames(const Descriptor& type) {
  std::vector<std::string> names;
  for (int i = 0; i < type.field_count(); ++i) names.push_back(type.field(i)->name());
  return absl::StrJoin(names, ", ");
}

absl::StatusOr<Step> ParseStep(const Message& message, absl::string_view part) {
  Step step;
  absl::string_view name = part;
  if (const size_t bracket = part.find('['); bracket != absl::string_view::npos) {
    name = part.substr(0, bracket);
    absl::string_view index = part.substr(bracket + 1);
    if (!absl::ConsumeSuffix(&index, "]") || !absl::SimpleAtoi(index, &step.index) || step.index < 0) {
      return absl::InvalidArgumentError(absl::StrCat("\"", part, "\": expected an index as in name[0]"));
    }
  }
  const Descriptor& type = *message.GetDescriptor();
  step.field = type.FindFieldByName(std::string(name));
  if (step.field == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", name, "\" is no field of ", type.name(), ", expected one of ", FieldNames(type)));
  }
  if (step.field->is_repeated() != (step.index >= 0)) {
    return absl::InvalidArgumentError(
        step.field->is_repeated() ? absl::StrCat("\"", part, "\" is a list: name an entry, as in ", name, "[0]")
                                  : absl::StrCat("\"", part, "\" is not a list"));
  }
  return step;
}

// The message at `step`, made if it is missing; an index one past the end adds an entry.
absl::StatusOr<Message*> Descend(Message& message, const Step& step) {
  const auto& reflection = *message.GetReflection();
  if (step.field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
    return absl::InvalidArgumentError(absl::StrCat("\"", step.field->name(), "\" has no fields"));
  }
  if (!step.field->is_repeated()) return reflection.MutableMessage(&message, step.field);
  const int size = reflection.FieldSize(message, step.field);
  if (step.index < size) return reflection.MutableRepeatedMessage(&message, step.field, step.index);
  if (step.index == size) return reflection.AddMessage(&message, step.field);
  return absl::InvalidArgumentError(
      absl::StrCat(step.field->name(), "[", step.index, "]: the list has ", size, " entries"));
}

absl::Status SetMessage(Message& message, absl::string_view value) {
  if (!absl::ConsumePrefix(&value, "{") || !absl::ConsumeSuffix(&value, "}")) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected a field of it or \"{…}\"; its fields are ", FieldNames(*message.GetDescriptor())));
  }
  return ParseText(std::string(value), message);
}

absl::Status SetScalar(Message& message, const FieldDescriptor* field, const std::string& value) {
  const bool quoted = value.size() >= 2 && (value.front() == '"' || value.front() == '\'');
  if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING && !quoted) {
    message.GetReflection()->SetString(&message, field, value);
    return absl::OkStatus();
  }
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  // An unterminated string is reported, yet parsed.
  if (parser.ParseFieldValueFromString(value, field, &message) && error.text().empty()) return absl::OkStatus();
  std::string expected(field->cpp_type_name());
  if (field->cpp_type() == FieldDescriptor::CPPTYPE_ENUM) {
    std::vector<std::string> names;
    for (int i = 1; i < field->enum_type()->value_count(); ++i) names.push_back(field->enum_type()->value(i)->name());
    expected = absl::StrJoin(names, ", ");
  }
  return absl::InvalidArgumentError(absl::StrCat("\"", value, "\" is not valid, expected ", expected,
                                                 error.message().empty() ? "" : ": ", error.message()));
}

absl::Status Set(Message& root, absl::string_view path, absl::string_view value) {
  const std::vector<absl::string_view> parts = absl::StrSplit(path, '.');
  Message* message = &root;
  for (size_t i = 0; i < parts.size(); ++i) {
    ASSIGN_OR_RETURN(const Step step, ParseStep(*message, parts[i]));
    if (i + 1 == parts.size() && step.field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
      return SetScalar(*message, step.field, std::string(value));
    }
    ASSIGN_OR_RETURN(message, Descend(*message, step));
  }
  return SetMessage(*message, value);
}

}  // namespace

absl::Status SetField(config::v1::Experiment& experiment, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", assignment, "\": expected path=value, for example learning.batch_size=16"));
  }
  const absl::string_view path = absl::StripAsciiWhitespace(absl::string_view(assignment).substr(0, equals));
  const absl::string_view value = absl::StripAsciiWhitespace(absl::string_view(assignment).substr(equals + 1));
  config::v1::Experiment changed = experiment;  // so that an error leaves everything as it was
  RETURN_IF_ERROR(Annotate(Set(changed, path, value), path));
  experiment = std::move(changed);
  return absl::OkStatus();
}

}  // namespace orrery
