// orrery-replay: keeps the experience of one run.
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/shutdown.h"
#include "libs/base/status.h"
#include "libs/config/config.h"
#include "libs/replay/store_password.h"
#include "libs/telemetry/service_host.h"
#include "libs/telemetry/service_main.h"
#include "services/replay/replay_service_impl.h"

namespace orrery {
namespace {
const ServiceDefaults kDefaults = {"replay", 7101, 7201, 9101};

// Null when asked to end while waiting. A store that is not there yet is waited for: services may start in any order.
absl::StatusOr<std::unique_ptr<Store>> AwaitStore(const StoreOptions& options, absl::Duration patience) {
  const absl::Time give_up = absl::Now() + patience;
  while (true) {
    absl::StatusOr<std::unique_ptr<Store>> store = OpenStore(options);
    const absl::Status status = store.ok() ? (*store)->Now().status() : store.status();
    if (status.ok()) return store;
    if (!absl::IsUnavailable(status) || absl::Now() >= give_up) return status;
    LogWarning("waiting for the store error=\"{}\"", status.ToString());
    if (WaitForShutdownSignal(absl::Seconds(1)) != 0) return nullptr;
  }
}

struct StoreFlags {
  std::string location = "redis://127.0.0.1:6379";
  std::string password_file;
  int connections = StoreOptions{}.max_connections;
  int wait_seconds = 30;
};

void AddStoreFlags(CLI::App& app, StoreFlags& flags) {
  app.add_option("--store", flags.location,
                 "Where the data lives: redis://[USER:PASSWORD@]HOST:PORT, "
                 "redis-cluster://[USER:PASSWORD@]HOST:PORT[,HOST:PORT…], file:FOLDER or memory:")
      ->capture_default_str()
      ->type_name("LOCATION");
  app.add_option("--store_password_file", flags.password_file,
                 "Redis' password: the file's text without its last newline. Default: the environment's ORRERY_STORE_PASSWORD")
      ->type_name("FILE");
  app.add_option("--store_connections", flags.connections,
                 "Connections to each Redis at most; those that wait for changes are not counted")
      ->capture_default_str()
      ->check(CLI::Range(1, 10000));
  app.add_option("--store_wait", flags.wait_seconds, "Seconds to wait for a store that does not answer at start")
      ->capture_default_str()
      ->check(CLI::Range(0, 86400));
}

absl::Status Serve(const CommonFlags& flags, const StoreFlags& store_flags) {
  ASSIGN_OR_RETURN(config::v1::Experiment experiment, LoadExperiment(flags.config, flags.set));
  LogInfo("configuration {}", experiment.ShortDebugString());
  StoreOptions store_options;
  ASSIGN_OR_RETURN(store_options.location, AddStorePassword(store_flags.location, store_flags.password_file));
  store_options.max_connections = store_flags.connections;
  store_options.run = experiment.name();
  store_options.partitions = experiment.replay().partitions();
  ASSIGN_OR_RETURN(const std::unique_ptr<Store> store,
                   AwaitStore(store_options, absl::Seconds(store_flags.wait_seconds)));
  if (store == nullptr) return absl::OkStatus();
  HostOptions host_options = MakeHostOptions(kDefaults, flags);
  ASSIGN_OR_RETURN(const std::unique_ptr<ReplayServer> server,
                   ReplayServer::Create({std::move(experiment), store.get(), host_options.registry}));
  host_options.services = {server->service()};
  ASSIGN_OR_RETURN(const std::unique_ptr<ServiceHost> host, ServiceHost::Start(host_options));
  server->Start([&host](bool ready) { host->SetReady(ready); });
  AwaitShutdown(*host, kDefaults.name, [&server] { server->Shutdown(); });
  return absl::OkStatus();
}
}  // namespace
}  // namespace orrery

int main(int argc, char** argv) {
  orrery::CommonFlags flags;
  orrery::StoreFlags store;
  CLI::App app("Keeps the experience of a run: hands out episodes, stores chunks, serves them to learners.");
  orrery::AddCommonFlags(app, orrery::kDefaults, flags);
  app.get_option("--config")->required();
  orrery::AddStoreFlags(app, store);
  return orrery::RunProgram(argc, argv, app, "orrery-replay", flags, [&] { return orrery::Serve(flags, store); });
}
