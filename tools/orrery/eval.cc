// orrery eval: plays episodes without exploration noise and prints their returns.
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "libs/base/cpu.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/config/config.h"
#include "libs/envs/environment.h"
#include "libs/telemetry/service_host.h"
#include "services/actor/actor.h"
#include "services/planner/planner_service_impl.h"
#include "tools/orrery/command.h"
#include "tools/orrery/policy.h"

namespace orrery {
namespace {

struct Flags {
  std::string planner;
  std::string snapshot;
  std::string environment;
  std::string config;
  std::vector<std::string> set;
  std::string algorithm = "cem";
  std::string quality;
  int action_repeat = 0;
  int image_size = 0;
  int episodes = 1;
  int64_t seed = 0;
  int threads = 0;
  bool json = false;
};

// The experiment that says how to play: --config, or the configuration of the run that the snapshot lies in, or nothing.
absl::StatusOr<std::optional<config::v1::Experiment>> FindExperiment(const Flags& flags) {
  std::string path = flags.config;
  if (path.empty() && !flags.snapshot.empty()) {
    const std::filesystem::path run = std::filesystem::absolute(flags.snapshot).parent_path().parent_path();
    std::error_code ignored;
    if (std::filesystem::exists(run / "config.textproto", ignored)) path = run / "config.textproto";
  }
  if (path.empty() && !flags.set.empty()) return absl::InvalidArgumentError("--set needs --config");
  if (path.empty()) return std::optional<config::v1::Experiment>();
  ASSIGN_OR_RETURN(config::v1::Experiment experiment, LoadExperiment(path, flags.set));
  return std::optional<config::v1::Experiment>(std::move(experiment));
}

absl::StatusOr<EnvironmentOptions> PlayedEnvironment(const Flags& flags,
                                                     const std::optional<config::v1::Experiment>& experiment) {
  EnvironmentOptions options;
  if (experiment.has_value()) options = ToEnvironmentOptions(experiment->environment());
  if (!flags.environment.empty() && flags.environment != options.task) {
    options.task = flags.environment;
    options.time_limit = 0;
  }
  if (options.task.empty()) return absl::InvalidArgumentError("give the task with --env or --config");
  if (flags.action_repeat > 0) options.action_repeat = flags.action_repeat;
  if (flags.image_size > 0) options.image_size = flags.image_size;
  if (!flags.quality.empty()) {
    options.quality = flags.quality == "reference" ? EnvironmentOptions::Quality::kReference
                                                   : EnvironmentOptions::Quality::kFast;
  }
  return options;
}

// A planner service in this process, with the snapshot of a file.
class LocalPlanner {
 public:
  static absl::StatusOr<std::unique_ptr<LocalPlanner>> Create(const std::string& snapshot,
                                                              const std::optional<config::v1::Planner>& planner,
                                                              config::v1::PlannerService::Precision precision,
                                                              int threads) {
    auto local = std::unique_ptr<LocalPlanner>(new LocalPlanner);
    PlannerServer::Options options;
    options.service.set_max_batch(1);
    options.service.set_max_delay_micros(0);
    options.service.set_precision(precision);
    options.planner = planner;
    options.threads = threads;
    options.run = "eval";
    options.registry = std::make_shared<prometheus::Registry>();
    HostOptions host;
    host.name = "planner";
    host.registry = options.registry;
    ASSIGN_OR_RETURN(local->server_, PlannerServer::Create(std::move(options)));
    ASSIGN_OR_RETURN(const std::string file, ReadFile(snapshot));
    RETURN_IF_ERROR(Annotate(local->server_->snapshots().Load(file), snapshot));
    host.services = {local->server_->service()};
    ASSIGN_OR_RETURN(local->host_, ServiceHost::Start(std::move(host)));
    return local;
  }
  ~LocalPlanner() {
    if (server_ != nullptr) server_->Close();
    if (host_ != nullptr) host_->Shutdown(absl::Seconds(1));
  }
  std::shared_ptr<grpc::Channel> Channel() { return host_->InProcessChannel(); }

 private:
  LocalPlanner() = default;
  std::unique_ptr<PlannerServer> server_;
  std::unique_ptr<ServiceHost> host_;
};

// Size of the pictures that the served model takes; 0: it takes none.
absl::StatusOr<int> ImageSize(PlannerPolicy& policy) {
  ASSIGN_OR_RETURN(const planner::v1::GetModelResponse response, policy.Model());
  ASSIGN_OR_RETURN(const config::v1::Model model, ParseModel(response.model_config()));
  for (const config::v1::Modality& modality : model.modalities()) {
    if (modality.has_image()) return modality.image().height();
  }
  return 0;
}

void Print(const Flags& flags, const EnvironmentOptions& options, const Evaluation& evaluation,
           SnapshotVersion version) {
  const double mean = Mean(evaluation.returns);
  const double deviation = SampleDeviation(evaluation.returns);
  if (flags.json) {
    nlohmann::ordered_json out;
    out["env"] = options.task;
    out["algorithm"] = flags.algorithm;
    out["action_repeat"] = options.action_repeat;
    out["seed"] = flags.seed;
    out["episodes"] = flags.episodes;
    out["returns"] = evaluation.returns;
    out["rows"] = evaluation.rows;
    out["mean"] = mean;
    out["std"] = deviation;
    if (flags.algorithm != "random") {
      out["snapshot"] = {{"generation", version.generation}, {"counter", version.counter}};
    }
    std::printf("%s\n", out.dump().c_str());
    return;
  }
  for (size_t k = 0; k < evaluation.returns.size(); ++k) {
    std::printf("episode %zu: return %.3f in %lld decisions\n", k, evaluation.returns[k],
                static_cast<long long>(evaluation.rows[k] - 1));
  }
  std::printf("%s, %s, %d episodes: mean %.3f, standard deviation %.3f\n", options.task.c_str(),
              flags.algorithm.c_str(), flags.episodes, mean, deviation);
}

absl::Status Run(const Flags& flags) {
  UnblockShutdownSignals();
  const bool random = flags.algorithm == "random";
  if (!random && flags.planner.empty() == flags.snapshot.empty()) {
    return absl::InvalidArgumentError("give either --planner=HOST:PORT or --snapshot=FILE (or --algorithm=random)");
  }
  SetTorchThreads(1);
  ASSIGN_OR_RETURN(const std::optional<config::v1::Experiment> experiment, FindExperiment(flags));
  ASSIGN_OR_RETURN(EnvironmentOptions options, PlayedEnvironment(flags, experiment));
  std::unique_ptr<LocalPlanner> local;
  std::shared_ptr<grpc::Channel> channel;
  if (!random && !flags.snapshot.empty()) {
    std::optional<config::v1::Planner> planner;
    if (!flags.config.empty()) planner = experiment->planner();
    ASSIGN_OR_RETURN(local, LocalPlanner::Create(flags.snapshot, planner,
                                                 experiment.value_or(config::v1::Experiment()).planner_service().precision(),
                                                 ThreadsOf(flags.threads)));
    channel = local->Channel();
  } else if (!random) {
    ASSIGN_OR_RETURN(channel, MakeChannel(flags.planner));
  }
  if (!random && flags.image_size == 0) {
    PlannerPolicy asking(channel, {});
    ASSIGN_OR_RETURN(const int size, ImageSize(asking));
    if (size > 0) options.image_size = size;
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Environment> environment, MakeEnvironment(options));
  Evaluation evaluation;
  SnapshotVersion version;
  if (random) {
    RandomPolicy policy(environment->spec().action);
    ASSIGN_OR_RETURN(evaluation, Evaluate(*environment, policy, flags.episodes, static_cast<uint64_t>(flags.seed)));
  } else {
    PlannerPolicy policy(channel, environment->spec().action);
    ASSIGN_OR_RETURN(evaluation, Evaluate(*environment, policy, flags.episodes, static_cast<uint64_t>(flags.seed)));
    version = policy.version();
  }
  Print(flags, options, evaluation, version);
  return absl::OkStatus();
}

}  // namespace

void AddEvalCommand(CLI::App& app, Command& command) {
  CLI::App* eval = app.add_subcommand("eval", "Plays episodes without exploration noise and prints their returns");
  auto flags = std::make_shared<Flags>();
  CLI::Option* planner = eval->add_option("--planner", flags->planner, "HOST:PORT of a planner service");
  eval->add_option("--snapshot", flags->snapshot, "Snapshot (safetensors) to plan with in this process")
      ->type_name("FILE")
      ->excludes(planner);
  eval->add_option("--env", flags->environment, "Task (default: the configuration's)");
  eval->add_option("--config", flags->config,
                   "Experiment that says how to play (default: of the run folder that the snapshot lies in)")
      ->type_name("FILE");
  eval->add_option("--set", flags->set, "Sets one field of the experiment; may be repeated")->allow_extra_args(false);
  eval->add_option("--algorithm", flags->algorithm, "cem: what the planner does; random: uniformly random actions")
      ->check(CLI::IsMember({"cem", "random"}))
      ->capture_default_str();
  eval->add_option("--action_repeat", flags->action_repeat,
                   "Simulator steps per decision (default: the configuration's, else 1)")
      ->check(CLI::Range(1, 64));
  eval->add_option("--image_size", flags->image_size, "Height and width of the pictures (default: the model's)")
      ->check(CLI::IsMember({32, 64}));
  eval->add_option("--quality", flags->quality, "Rendering: fast or reference (default: the configuration's, else fast)")
      ->check(CLI::IsMember({"fast", "reference"}));
  eval->add_option("--episodes", flags->episodes, "Episodes to play")->check(CLI::Range(1, 100000))->capture_default_str();
  eval->add_option("--seed", flags->seed, "Seed of the episodes; every algorithm meets the same ones")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  eval->add_flag("--json", flags->json, "Prints one JSON object");
  AddThreadsFlag(*eval, flags->threads, "Threads that plan");
  eval->callback([&command, flags] { command = [flags] { return Run(*flags); }; });
}

}  // namespace orrery
