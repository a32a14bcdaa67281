// orrery planner list|rollback|resume: which snapshots running planners serve.
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/client/planner_client.h"
#include "tools/orrery/command.h"

namespace orrery {
namespace {

using common::v1::SnapshotVersion;

struct Flags {
  std::vector<std::string> planners;
  std::string model;
  double timeout = 10;
  bool json = false;
};

// One planner that was named.
struct Asked {
  std::string address;
  std::unique_ptr<PlannerClient> client;
  absl::Time deadline;
};

std::string Text(bool known, const SnapshotVersion& version) {
  return known ? absl::StrCat(version.generation(), ".", version.counter()) : "none";
}

nlohmann::ordered_json Json(bool known, const SnapshotVersion& version) {
  if (!known) return nullptr;
  return {{"generation", version.generation()}, {"counter", version.counter()}};
}

void Print(const Flags& flags, const std::string& address, const planner::v1::ModelState& state) {
  if (flags.json) {
    const nlohmann::ordered_json line = {{"planner", address},
                                         {"model", state.model()},
                                         {"served", Json(state.has_snapshot_version(), state.snapshot_version())},
                                         {"newest", Json(state.has_newest_version(), state.newest_version())},
                                         {"previous", Json(state.has_previous_version(), state.previous_version())},
                                         {"held", state.held()}};
    std::cout << line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
    return;
  }
  std::cout << absl::StreamFormat("%s model \"%s\": serves %s%s, newest %s, the one before %s\n", address, state.model(),
                                  Text(state.has_snapshot_version(), state.snapshot_version()), state.held() ? " (held)" : "",
                                  Text(state.has_newest_version(), state.newest_version()),
                                  Text(state.has_previous_version(), state.previous_version()));
}

// The state of the model that the flags name.
absl::StatusOr<planner::v1::ModelState> Find(const Flags& flags, const planner::v1::ListModelsResponse& models) {
  if (flags.model.empty() && models.models_size() == 1) return models.models(0);
  std::string names;
  for (const planner::v1::ModelState& state : models.models()) {
    if (!flags.model.empty() && state.model() == flags.model) return state;
    absl::StrAppend(&names, names.empty() ? "" : ", ", "\"", state.model(), "\"");
  }
  if (flags.model.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("several models are served: give --model, one of ", names));
  }
  return absl::NotFoundError(absl::StrCat("--model=", flags.model, " is not served, expected one of ", names));
}

absl::Status List(const Flags& flags, const Asked& asked) {
  ASSIGN_OR_RETURN(const planner::v1::ListModelsResponse models, asked.client->ListModels(asked.deadline));
  if (!flags.model.empty()) RETURN_IF_ERROR(Find(flags, models).status());
  for (const planner::v1::ModelState& state : models.models()) {
    if (flags.model.empty() || state.model() == flags.model) Print(flags, asked.address, state);
  }
  return absl::OkStatus();
}

absl::Status Rollback(const Flags& flags, const Asked& asked) {
  ASSIGN_OR_RETURN(const planner::v1::ListModelsResponse models, asked.client->ListModels(asked.deadline));
  ASSIGN_OR_RETURN(const planner::v1::ModelState before, Find(flags, models));
  planner::v1::RollbackRequest request;
  request.set_model(flags.model);
  // Tried again after a lost answer, it must not go back twice.
  if (before.has_snapshot_version()) *request.mutable_expected_version() = before.snapshot_version();
  ASSIGN_OR_RETURN(const planner::v1::RollbackResponse response, asked.client->Rollback(request, asked.deadline));
  Print(flags, asked.address, response.state());
  return absl::OkStatus();
}

absl::Status Resume(const Flags& flags, const Asked& asked) {
  ASSIGN_OR_RETURN(const planner::v1::ResumeResponse response, asked.client->Resume(flags.model, asked.deadline));
  Print(flags, asked.address, response.state());
  return absl::OkStatus();
}

// Asks every planner, also after one that failed; then the first error.
absl::Status AskAll(const Flags& flags, absl::Status (*ask)(const Flags&, const Asked&)) {
  UnblockShutdownSignals();
  absl::Status first;
  for (const std::string& address : flags.planners) {
    absl::StatusOr<std::shared_ptr<grpc::Channel>> channel = MakeChannel(address);
    absl::Status status = channel.status();
    if (status.ok()) {
      const absl::Time deadline = absl::Now() + absl::Seconds(flags.timeout);
      status = ask(flags, {address, std::make_unique<PlannerClient>(*std::move(channel)), deadline});
    }
    first.Update(Annotate(status, absl::StrCat("--planner=", address)));
  }
  return first;
}

}  // namespace

void AddPlannerCommand(CLI::App& app, Command& command) {
  CLI::App* planner = app.add_subcommand("planner", "Which snapshots running planners serve");
  planner->require_subcommand(1);
  auto flags = std::make_shared<Flags>();
  const auto add = [&](const char* name, const char* what, absl::Status (*ask)(const Flags&, const Asked&)) {
    CLI::App* sub = planner->add_subcommand(name, what);
    sub->add_option("--planner", flags->planners, "Planner to ask, one replica; repeat it for several")
        ->type_name("HOST:PORT")
        ->allow_extra_args(false)
        ->required();
    sub->add_option("--model", flags->model, "Name of the model, where a planner serves several");
    sub->add_option("--timeout", flags->timeout, "Seconds for each planner")
        ->check(CLI::Range(0.001, 1e6))
        ->capture_default_str();
    sub->add_flag("--json", flags->json, "Prints one JSON object a line");
    sub->callback([&command, flags, ask] { command = [flags, ask] { return AskAll(*flags, ask); }; });
  };
  add("list", "Lists the models with the versions served, newest and before", List);
  add("rollback", "Serves the snapshot before the one served, at once, and holds it", Rollback);
  add("resume", "Ends the hold of a rollback: the newest snapshot is served, and each that comes", Resume);
}

}  // namespace orrery
