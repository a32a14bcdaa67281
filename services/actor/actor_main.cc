#include "services/actor/actor_main.h"

#include <unistd.h>

#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "libs/base/log.h"
#include "libs/base/shutdown.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/config/config.h"
#include "libs/telemetry/service_main.h"
#include "services/actor/actor.h"

namespace orrery {
namespace {

const ServiceDefaults kDefaults{"actor", 0, 0, 9104};

struct Flags {
  CommonFlags common;
  std::string replay = "127.0.0.1:7101";
  std::string planner = "127.0.0.1:7103";
  std::string model;
  std::string actor_id;
  double step_timeout = 60;  // seconds
};

std::string DefaultActorId() {
  char host[256] = "actor";
  gethostname(host, sizeof(host) - 1);
  return absl::StrCat(std::string(host).substr(0, 100), "-", getpid());
}

absl::Status Play(const Flags& flags) {
  ASSIGN_OR_RETURN(config::v1::Experiment experiment, LoadExperiment(flags.common.config, flags.common.set));
  LogInfo("configuration\n{}", ToText(experiment));
  HostOptions host_options = MakeHostOptions(kDefaults, flags.common);
  ActorOptions options;
  options.experiment = std::move(experiment);
  options.model = flags.model;
  options.actor_id = flags.actor_id.empty() ? DefaultActorId() : flags.actor_id;
  options.registry = host_options.registry;
  options.environment_timeout = absl::Seconds(flags.step_timeout);
  ASSIGN_OR_RETURN(options.replay, MakeChannel(flags.replay));
  ASSIGN_OR_RETURN(options.planner, MakeChannel(flags.planner));
  options.on_episode = [](const EpisodeSummary& episode) {
    LogInfo("episode={} task={} rows={} return={:.3f} seconds={:.1f}", episode.episode_id, episode.task, episode.rows,
            episode.episode_return, episode.seconds);
  };
  ASSIGN_OR_RETURN(std::unique_ptr<ServiceHost> host, ServiceHost::Start(std::move(host_options)));
  ASSIGN_OR_RETURN(std::unique_ptr<Actor> actor, Actor::Create(std::move(options)));
  host->SetReady(true);
  LogInfo("actor ready replay={} planner={} metrics_port={}", flags.replay, flags.planner, host->metrics_port());

  absl::Status result;
  absl::Notification ended;
  std::thread player([&] {
    result = actor->Run();
    ended.Notify();
  });
  while (!ended.HasBeenNotified()) {
    if (WaitForShutdownSignal(absl::Milliseconds(200)) == 0) continue;
    LogInfo("stopping: sending what the running episodes have");
    host->SetReady(false);
    actor->Stop();
    break;
  }
  player.join();
  host->Shutdown(absl::Seconds(1));
  return result;
}

}  // namespace

int ActorMain(int argc, char** argv) {
  Flags flags;
  CLI::App app("Plays episodes of a run: asks replay what to play and the planner how, and sends the rows to replay.");
  AddCommonFlags(app, kDefaults, flags.common);
  app.get_option("--config")->required();
  app.add_option("--replay", flags.replay, "HOST:PORT of the replay service")->capture_default_str();
  app.add_option("--planner", flags.planner, "HOST:PORT of the planner service")->capture_default_str();
  app.add_option("--model", flags.model, "Model to ask the planner for, where it serves several");
  app.add_option("--actor_id", flags.actor_id, "Name of this actor, unique in the run (default: host and process id)");
  app.add_option("--step_timeout", flags.step_timeout, "Seconds after which an environment that does not return has failed")
      ->check(CLI::Range(0.001, 86400.0))
      ->capture_default_str();
  return RunProgram(argc, argv, app, "orrery-actor", flags.common, [&] { return Play(flags); });
}

}  // namespace orrery
