// orrery-planner: answers observations with actions.
#include <torch/torch.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "libs/base/cpu.h"
#include "libs/base/file.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/config/config.h"
#include "libs/telemetry/service_main.h"
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
  std::string device = "cpu";
  int threads = 0;
};

void AddFlags(CLI::App& app, PlannerFlags& flags) {
  AddCommonFlags(app, kDefaults, flags.common);
  app.add_option("--learner", flags.learner, "Learner to subscribe to")->type_name("HOST:PORT");
  app.add_option("--replay", flags.replay, "Replay to ask for a snapshot while no learner is there")->type_name("HOST:PORT");
  app.add_option("--snapshot", flags.snapshot, "Snapshot to serve until a newer one comes")->type_name("FILE");
  app.add_option("--run", flags.run, "Name of the run; default: the experiment's name");
  app.add_option("--device", flags.device, "cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--threads", flags.threads, "Threads that compute; 0: as many as affinity and cgroup leave")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

std::string MakePlannerId() {
  char host[65] = "";
  gethostname(host, sizeof(host) - 1);
  return absl::StrCat("planner-", host, "-", getpid(), "-", absl::Hex(std::random_device{}()));
}

absl::StatusOr<std::unique_ptr<SnapshotSubscriber>> MakeSubscriber(const PlannerFlags& flags, const std::string& run,
                                                                   SnapshotHolder& holder) {
  if (flags.learner.empty() && flags.replay.empty()) return nullptr;
  if (run.empty()) return absl::InvalidArgumentError("--learner and --replay need the name of the run: give --config or --run");
  SnapshotSubscriber::Options options;
  options.run = run;
  options.planner_id = MakePlannerId();
  if (!flags.learner.empty()) {
    ASSIGN_OR_RETURN(options.learner, MakeChannel(flags.learner));
  }
  if (!flags.replay.empty()) {
    ASSIGN_OR_RETURN(options.replay, MakeChannel(flags.replay));
  }
  options.holder = &holder;
  return std::make_unique<SnapshotSubscriber>(std::move(options));
}

absl::Status Serve(const PlannerFlags& flags) {
  const int threads = ThreadsOf(flags.threads);
  torch::set_num_threads(1);
  torch::set_num_interop_threads(1);

  if (flags.learner.empty() && flags.replay.empty() && flags.snapshot.empty()) {
    return absl::InvalidArgumentError("nothing to serve: give --learner, --replay or --snapshot");
  }
  config::v1::Experiment experiment;
  if (!flags.common.config.empty()) {
    ASSIGN_OR_RETURN(experiment, LoadExperiment(flags.common.config, flags.common.set));
  } else if (!flags.common.set.empty()) {
    return absl::InvalidArgumentError("--set needs --config");
  }
  const std::string run = flags.run.empty() ? experiment.name() : flags.run;
  LogInfo("planner starting run=\"{}\" device={} threads={} planner_service={{{}}}", run, flags.device, threads,
          experiment.planner_service().ShortDebugString());

  HostOptions host_options = MakeHostOptions(kDefaults, flags.common);
  ServiceHost* ready_host = nullptr;
  PlannerServer::Options options;
  options.service = experiment.planner_service();
  if (experiment.has_planner()) options.planner = experiment.planner();
  options.run = run;
  options.device = flags.device;
  options.threads = threads;
  options.registry = host_options.registry;
  // Nothing is loaded before the host is there.
  options.on_swap = [&ready_host](const ServedModel&) { ready_host->SetReady(true); };
  ASSIGN_OR_RETURN(const std::unique_ptr<PlannerServer> planner, PlannerServer::Create(options));

  host_options.services = {planner->service()};
  ASSIGN_OR_RETURN(const std::unique_ptr<ServiceHost> host, ServiceHost::Start(std::move(host_options)));
  ready_host = host.get();
  if (!flags.snapshot.empty()) {
    ASSIGN_OR_RETURN(const std::string file, ReadFile(flags.snapshot));
    RETURN_IF_ERROR(Annotate(planner->snapshots().Load(file), flags.snapshot));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<SnapshotSubscriber> subscriber, MakeSubscriber(flags, run, planner->snapshots()));
  // Swaps set readiness, so they must end before the drain unsets it.
  AwaitShutdown(*host, kDefaults.name, [&subscriber] { subscriber.reset(); });
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
