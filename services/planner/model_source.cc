#include "services/planner/model_source.h"

#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace orrery {
namespace {

absl::Status Refused(const std::string& text, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat(
      "--model=", text, ": ", why, "; expected NAME=KIND:VALUE[,KIND:VALUE…], KIND one of file, learner, replay and run"));
}

}  // namespace

absl::StatusOr<ModelSource> ParseModelSource(const std::string& text) {
  const std::pair<std::string, std::string> parts = absl::StrSplit(text, absl::MaxSplits('=', 1));
  ModelSource source;
  source.name = parts.first;
  if (source.name.empty()) return Refused(text, "the name is empty");
  const std::map<std::string, std::string*> fields = {
      {"file", &source.snapshot}, {"learner", &source.learner}, {"replay", &source.replay}, {"run", &source.run}};
  for (const auto& part : absl::StrSplit(parts.second, ',')) {
    const std::pair<std::string, std::string> given = absl::StrSplit(part, absl::MaxSplits(':', 1));
    const auto field = fields.find(given.first);
    if (field == fields.end()) return Refused(text, absl::StrCat("\"", given.first, "\" is no kind of source"));
    if (given.second.empty()) return Refused(text, absl::StrCat(given.first, " has no value"));
    if (!field->second->empty()) return Refused(text, absl::StrCat(given.first, " is given twice"));
    *field->second = given.second;
  }
  if (source.snapshot.empty() && source.learner.empty() && source.replay.empty()) return Refused(text, "no source is given");
  if (source.run.empty()) source.run = source.name;
  return source;
}

}  // namespace orrery
