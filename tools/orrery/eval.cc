// orrery eval: plays episodes without exploration noise and prints their returns.
#include <algorithm>
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
#include "absl/strings/str_join.h"
#include "libs/base/cpu.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/config/config.h"
#include "libs/envs/environment.h"
#include "libs/envs/tasks.h"
#include "libs/telemetry/service_host.h"
#include "services/actor/actor.h"
#include "services/planner/planner_service_impl.h"
#include "tools/orrery/command.h"
#include "tools/orrery/policy.h"
#include "tools/orrery/simulator_policy.h"

namespace orrery {
namespace {

struct Flags {
  std::string planner;
  std::string model;
  std::string snapshot;
  std::string environment;
  std::string config;
  std::vector<std::string> set;
  std::string algorithm = "planner";
  std::string quality;
  int action_repeat = 0;
  int image_size = 0;
  int episodes = 1;
  int64_t seed = 0;
  int threads = 0;
  std::vector<std::string> drop;
  bool json = false;
};

bool IsServed(const Flags& flags) { return flags.algorithm != "simulator" && flags.algorithm != "random"; }

absl::Status CheckFlags(const Flags& flags) {
  if (flags.algorithm == "simulator" && !(flags.planner.empty() && flags.snapshot.empty())) {
    return absl::InvalidArgumentError(
        "--algorithm=simulator plans with the task's own simulator: give neither --planner nor --snapshot");
  }
  if (IsServed(flags) && flags.planner.empty() == flags.snapshot.empty()) {
    return absl::InvalidArgumentError(
        "give either --planner=HOST:PORT or --snapshot=FILE (or --algorithm=simulator or --algorithm=random)");
  }
  if (!flags.model.empty() && flags.planner.empty()) {
    return absl::InvalidArgumentError("--model goes with --planner: it names one of the models that a planner service has");
  }
  if (!IsServed(flags) && !flags.drop.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("--drop: --algorithm=", flags.algorithm, " does not look at observations"));
  }
  return absl::OkStatus();
}

// --algorithm's planner: the configuration's where it is of that kind, else with its defaults. Nothing: as --config (or the
// snapshot) says.
std::optional<config::v1::Planner> ChosenPlanner(const Flags& flags, const config::v1::Experiment& experiment) {
  std::optional<config::v1::Planner> configured;
  if (!flags.config.empty()) configured = experiment.planner();
  if (flags.algorithm == "planner") return configured;
  config::v1::Planner planner = experiment.planner();
  const auto* field = config::v1::Planner::descriptor()->FindFieldByName(flags.algorithm);
  planner.GetReflection()->MutableMessage(&planner, field);  // one of a kind: clears another algorithm
  return planner;
}

absl::Status CheckDropped(const std::vector<std::string>& dropped, const EnvironmentSpec& spec) {
  for (const std::string& name : dropped) {
    const auto is = [&](const TensorSpec& modality) { return modality.name == name; };
    if (std::any_of(spec.observations.begin(), spec.observations.end(), is)) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "--drop=", name, ": expected one of ",
        absl::StrJoin(spec.observations, ", ", [](std::string* out, const TensorSpec& m) { absl::StrAppend(out, m.name); })));
  }
  return absl::OkStatus();
}

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
  if (experiment.has_value()) {
    ASSIGN_OR_RETURN(const std::vector<EnvironmentOptions> tasks, TaskOptions(experiment->environment()));
    if (flags.environment.empty() && tasks.size() > 1) {
      return absl::InvalidArgumentError(absl::StrCat("the configuration has several tasks: choose one with --env, expected one of ",
                                                     absl::StrJoin(tasks, ", ", [](std::string* out, const auto& task) {
                                                       absl::StrAppend(out, task.task);
                                                     })));
    }
    const auto chosen = std::find_if(tasks.begin(), tasks.end(), [&](const auto& task) { return task.task == flags.environment; });
    options = chosen != tasks.end() ? *chosen : tasks[0];
  }
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

// What answers.
struct Served {
  int image_size = 0;  // of the pictures that the model takes; 0: none
  std::string algorithm;
};

absl::StatusOr<Served> AskServed(std::shared_ptr<grpc::Channel> channel, const std::string& model_name) {
  PlannerPolicy asking(std::move(channel), {}, model_name);
  ASSIGN_OR_RETURN(const planner::v1::GetModelResponse response, asking.Model());
  ASSIGN_OR_RETURN(const config::v1::Model model, ParseModel(response.model_config()));
  ASSIGN_OR_RETURN(const config::v1::Planner planner, ParsePlanner(response.planner_config()));
  Served served;
  for (const config::v1::Modality& modality : model.modalities()) {
    if (modality.has_image()) served.image_size = modality.image().height();
  }
  const auto* field = config::v1::Planner::descriptor()->FindFieldByNumber(planner.algorithm_case());
  served.algorithm = field != nullptr ? field->name() : "cem";
  return served;
}

void Print(const Flags& flags, const EnvironmentOptions& options, const std::string& algorithm,
           const Evaluation& evaluation, SnapshotVersion version) {
  const double mean = Mean(evaluation.returns);
  const double deviation = SampleDeviation(evaluation.returns);
  if (flags.json) {
    nlohmann::ordered_json out;
    out["env"] = options.task;
    if (!flags.model.empty()) out["model"] = flags.model;
    out["algorithm"] = algorithm;
    if (!flags.drop.empty()) out["dropped"] = flags.drop;
    out["action_repeat"] = options.action_repeat;
    out["seed"] = flags.seed;
    out["episodes"] = flags.episodes;
    out["returns"] = evaluation.returns;
    out["rows"] = evaluation.rows;
    out["mean"] = mean;
    out["std"] = deviation;
    if (IsServed(flags)) {
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
              algorithm.c_str(), flags.episodes, mean, deviation);
}

absl::Status Run(const Flags& flags) {
  UnblockShutdownSignals();
  RETURN_IF_ERROR(CheckFlags(flags));
  const bool served = IsServed(flags);
  SetTorchThreads(1);
  ASSIGN_OR_RETURN(const std::optional<config::v1::Experiment> found, FindExperiment(flags));
  ASSIGN_OR_RETURN(EnvironmentOptions options, PlayedEnvironment(flags, found));
  const config::v1::Experiment experiment = found.value_or(config::v1::Experiment());
  std::unique_ptr<LocalPlanner> local;
  std::shared_ptr<grpc::Channel> channel;
  if (served && !flags.snapshot.empty()) {
    ASSIGN_OR_RETURN(local, LocalPlanner::Create(flags.snapshot, ChosenPlanner(flags, experiment),
                                                 experiment.planner_service().precision(), ThreadsOf(flags.threads)));
    channel = local->Channel();
  } else if (served) {
    ASSIGN_OR_RETURN(channel, MakeChannel(flags.planner));
  }
  std::string algorithm = flags.algorithm;
  if (served) {
    ASSIGN_OR_RETURN(const Served answers, AskServed(channel, flags.model));
    if (flags.image_size == 0 && answers.image_size > 0) options.image_size = answers.image_size;
    if (algorithm != "planner" && algorithm != answers.algorithm) {
      return absl::InvalidArgumentError(absl::StrCat("--algorithm=", algorithm, ": the planner service plans with ",
                                                     answers.algorithm, "; give --snapshot=FILE to choose another"));
    }
    algorithm = answers.algorithm;
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Environment> environment, MakeEnvironment(options));
  const auto evaluate = [&](Policy& policy) {
    return Evaluate(*environment, policy, flags.episodes, static_cast<uint64_t>(flags.seed));
  };
  Evaluation evaluation;
  SnapshotVersion version;
  if (served) {
    RETURN_IF_ERROR(CheckDropped(flags.drop, environment->spec()));
    PlannerPolicy policy(channel, environment->spec().action, flags.model);
    BlindPolicy blind(policy, flags.drop);
    ASSIGN_OR_RETURN(evaluation, evaluate(blind));
    version = policy.version();
  } else if (flags.algorithm == "simulator") {
    ASSIGN_OR_RETURN(auto policy, SimulatorPolicy::Create(*environment, experiment.planner().cem(), ThreadsOf(flags.threads)));
    ASSIGN_OR_RETURN(evaluation, evaluate(*policy));
  } else {
    RandomPolicy policy(environment->spec().action);
    ASSIGN_OR_RETURN(evaluation, evaluate(policy));
  }
  Print(flags, options, algorithm, evaluation, version);
  return absl::OkStatus();
}

}  // namespace

void AddEvalCommand(CLI::App& app, Command& command) {
  CLI::App* eval = app.add_subcommand("eval", "Plays episodes without exploration noise and prints their returns");
  auto flags = std::make_shared<Flags>();
  CLI::Option* planner = eval->add_option("--planner", flags->planner, "HOST:PORT of a planner service");
  eval->add_option("--model", flags->model, "Model to ask the planner service for, where it has several");
  eval->add_option("--snapshot", flags->snapshot, "Snapshot (safetensors) to plan with in this process")
      ->type_name("FILE")
      ->excludes(planner);
  eval->add_option("--env", flags->environment, "Task (default: the configuration's)");
  eval->add_option("--config", flags->config,
                   "Experiment that says how to play (default: of the run folder that the snapshot lies in)")
      ->type_name("FILE");
  eval->add_option("--set", flags->set, "Sets one field of the experiment; may be repeated")->allow_extra_args(false);
  eval->add_option("--algorithm", flags->algorithm,
                   "planner: as the service, the configuration or the snapshot says; cem to actor: that one, by the snapshot's "
                   "model; simulator: CEM with the true simulator as its model; random: uniformly random actions")
      ->check(CLI::IsMember({"planner", "cem", "icem", "mppi", "genetic", "random_shooting", "actor", "simulator", "random"}))
      ->capture_default_str();
  eval->add_option("--action_repeat", flags->action_repeat,
                   "Simulator steps per decision (default: the configuration's, else 1)")
      ->check(CLI::Range(1, 64));
  eval->add_option("--image_size", flags->image_size, "Height and width of the pictures (default: the model's)")
      ->check(CLI::Range(32, 128));
  eval->add_option("--quality", flags->quality, "Rendering: fast or reference (default: the configuration's, else fast)")
      ->check(CLI::IsMember({"fast", "reference"}));
  eval->add_option("--episodes", flags->episodes, "Episodes to play")->check(CLI::Range(1, 100000))->capture_default_str();
  eval->add_option("--seed", flags->seed, "Seed of the episodes; every algorithm meets the same ones")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  eval->add_option("--drop", flags->drop, "Modality that the agent does not get to see; may be repeated")
      ->allow_extra_args(false)
      ->type_name("MODALITY");
  eval->add_flag("--json", flags->json, "Prints one JSON object");
  AddThreadsFlag(*eval, flags->threads, "Threads that plan");
  eval->callback([&command, flags] { command = [flags] { return Run(*flags); }; });
}

}  // namespace orrery
