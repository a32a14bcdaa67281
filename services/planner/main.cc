// orrery-planner: answers observations with actions.
#include <torch/torch.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "libs/base/cpu.h"
#include "libs/base/file.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/config/config.h"
#include "libs/telemetry/service_main.h"
#include "services/planner/model_source.h"
#include "services/planner/planner_service_impl.h"
#include "services/planner/snapshot_subscriber.h"

namespace orrery {
namespace {

const ServiceDefaults kDefaults = {"planner", 7103, 7203, 9103};

struct PlannerFlags {
  CommonFlags common;
  std::string learner;
  std::string replay;
  std::string snapshot;
  std::string run;
  std::vector<std::string> models;
  std::string device = "cpu";
  int threads = 0;
};

void AddFlags(CLI::App& app, PlannerFlags& flags) {
  AddCommonFlags(app, kDefaults, flags.common);
  app.add_option("--learner", flags.learner, "Learner to subscribe to")->type_name("HOST:PORT");
  app.add_option("--replay", flags.replay, "Replay to ask for a snapshot while no learner is there")->type_name("HOST:PORT");
  app.add_option("--snapshot", flags.snapshot, "Snapshot to serve until a newer one comes")->type_name("FILE");
  app.add_option("--run", flags.run, "Name of the run; default: the experiment's name");
  app.add_option("--model", flags.models,
                 "Serves several models: name and sources of one, file:PATH, learner:HOST:PORT, replay:HOST:PORT and run:RUN "
                 "(default: the name); repeat it, and leave out --learner, --replay, --snapshot and --run")
      ->type_name("NAME=KIND:VALUE[,KIND:VALUE…]")
      ->allow_extra_args(false);
  app.add_option("--device", flags.device, "cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--threads", flags.threads, "Threads that compute; 0: as many as affinity and cgroup leave")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

absl::StatusOr<std::unique_ptr<SnapshotSubscriber>> MakeSubscriber(const ModelSource& source, SnapshotHolder& holder) {
  if (source.learner.empty() && source.replay.empty()) return nullptr;
  if (source.run.empty()) {
    return absl::InvalidArgumentError("--learner and --replay need the name of the run: give --config or --run");
  }
  SnapshotSubscriber::Options options;
  options.run = source.run;
  options.planner_id = MakeProcessId(kDefaults.name);
  if (!source.learner.empty()) {
    ASSIGN_OR_RETURN(options.learner, MakeChannel(source.learner));
  }
  if (!source.replay.empty()) {
    ASSIGN_OR_RETURN(options.replay, MakeChannel(source.replay));
  }
  options.holder = &holder;
  return std::make_unique<SnapshotSubscriber>(std::move(options));
}

// What to serve: at least one model. The only one has a name where --model gives it.
absl::StatusOr<std::vector<ModelSource>> Sources(const PlannerFlags& flags, const config::v1::Experiment& experiment) {
  std::vector<ModelSource> sources;
  const bool single = !flags.learner.empty() || !flags.replay.empty() || !flags.snapshot.empty();
  if (flags.models.empty()) {
    if (!single) return absl::InvalidArgumentError("nothing to serve: give --learner, --replay, --snapshot or --model");
    sources.push_back({"", flags.snapshot, flags.learner, flags.replay, flags.run.empty() ? experiment.name() : flags.run});
    return sources;
  }
  if (single || !flags.run.empty()) {
    return absl::InvalidArgumentError(
        "--model says where a model comes from: leave out --learner, --replay, --snapshot and --run");
  }
  for (const std::string& text : flags.models) {
    ASSIGN_OR_RETURN(sources.emplace_back(), ParseModelSource(text));
  }
  return sources;
}

// Loads the files and begins to follow learners and replays.
absl::StatusOr<std::vector<std::unique_ptr<SnapshotSubscriber>>> Feed(const std::vector<ModelSource>& sources,
                                                                      PlannerServer& planner) {
  std::vector<std::unique_ptr<SnapshotSubscriber>> subscribers;
  for (size_t i = 0; i < sources.size(); ++i) {
    if (sources[i].snapshot.empty()) continue;
    ASSIGN_OR_RETURN(const std::string file, ReadFile(sources[i].snapshot));
    RETURN_IF_ERROR(Annotate(planner.snapshots(i).Load(file), sources[i].snapshot));
  }
  for (size_t i = 0; i < sources.size(); ++i) {
    ASSIGN_OR_RETURN(subscribers.emplace_back(), MakeSubscriber(sources[i], planner.snapshots(i)));
  }
  return subscribers;
}

absl::Status Serve(const PlannerFlags& flags) {
  const int threads = ThreadsOf(flags.threads);
  torch::set_num_threads(1);
  torch::set_num_interop_threads(1);

  config::v1::Experiment experiment;
  if (!flags.common.config.empty()) {
    ASSIGN_OR_RETURN(experiment, LoadExperiment(flags.common.config, flags.common.set));
  } else if (!flags.common.set.empty()) {
    return absl::InvalidArgumentError("--set needs --config");
  }
  ASSIGN_OR_RETURN(const std::vector<ModelSource> sources, Sources(flags, experiment));
  for (const ModelSource& source : sources) {
    LogInfo("planner starting model=\"{}\" run=\"{}\" learner={} replay={} snapshot={}", source.name, source.run,
            source.learner, source.replay, source.snapshot);
  }
  LogInfo("planner starting device={} threads={} planner_service={{{}}}", flags.device, threads,
          experiment.planner_service().ShortDebugString());

  HostOptions host_options = MakeHostOptions(kDefaults, flags.common);
  ServiceHost* ready_host = nullptr;
  PlannerServer::Options options;
  options.service = experiment.planner_service();
  if (experiment.has_planner()) options.planner = experiment.planner();
  if (flags.models.empty()) options.run = sources[0].run;
  for (size_t i = 0; i < flags.models.size(); ++i) options.models.push_back(sources[i].name);
  options.device = flags.device;
  options.threads = threads;
  options.registry = host_options.registry;
  // Nothing is loaded before the host is there.
  options.on_ready = [&ready_host] { ready_host->SetReady(true); };
  ASSIGN_OR_RETURN(const std::unique_ptr<PlannerServer> planner, PlannerServer::Create(options));

  host_options.services = {planner->service()};
  ASSIGN_OR_RETURN(const std::unique_ptr<ServiceHost> host, ServiceHost::Start(std::move(host_options)));
  ready_host = host.get();
  ASSIGN_OR_RETURN(std::vector<std::unique_ptr<SnapshotSubscriber>> subscribers, Feed(sources, *planner));
  // Snapshots set readiness, so they must end before the drain unsets it.
  AwaitShutdown(*host, kDefaults.name, [&subscribers] { subscribers.clear(); });
  planner->Close();
  return absl::OkStatus();
}

}  // namespace
}  // namespace orrery

int main(int argc, char** argv) {
  orrery::PlannerFlags flags;
  CLI::App app("Answers observations with actions, planned in the newest snapshot of the world model.");
  orrery::AddFlags(app, flags);
  return orrery::RunProgram(argc, argv, app, "orrery-planner", flags.common, [&] { return orrery::Serve(flags); });
}
