#include "libs/envs/tasks.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/config/config.h"

namespace orrery {
namespace {

absl::Status CheckFit(const EnvironmentOptions& options, const EnvironmentSpec& spec, const EnvironmentOptions& first_options,
                      const EnvironmentSpec& first) {
  const auto refuse = [&](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("task \"", options.task, "\" has other ", what, " than task \"",
                                                   first_options.task, "\": one agent cannot play both"));
  };
  if (!(spec.observations == first.observations)) return refuse("observations");
  if (spec.action.discrete != first.action.discrete) return refuse("kinds of actions");
  if (spec.action.discrete && spec.action.size != first.action.size) return refuse("numbers of choices");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<EnvironmentOptions>> TaskOptions(const config::v1::Environment& environment,
                                                            const EnvironmentMaker& make) {
  std::vector<EnvironmentOptions> all;
  for (const config::v1::Environment& task : TaskEnvironments(environment)) all.push_back(ToEnvironmentOptions(task));
  if (all.size() == 1) return all;
  std::vector<EnvironmentSpec> specs;
  int size = 0;
  for (const EnvironmentOptions& options : all) {
    absl::StatusOr<std::unique_ptr<Environment>> made = make(options);
    if (!made.ok()) return Annotate(made.status(), options.task);
    specs.push_back((*made)->spec());
    RETURN_IF_ERROR(CheckFit(options, specs.back(), all[0], specs[0]));
    size = std::max(size, specs.back().action.size);
  }
  if (specs[0].action.discrete) return all;
  for (EnvironmentOptions& options : all) options.action_size = size;
  return all;
}

}  // namespace orrery
