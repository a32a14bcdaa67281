#include "libs/telemetry/service_main.h"

#include <algorithm>
#include <iostream>

#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/shutdown.h"

namespace orrery {
namespace {
void AddAddress(CLI::App& app, const std::string& flag, int port, const std::string& what, std::string& value) {
  if (port == 0) return;
  value = absl::StrCat("127.0.0.1:", port);
  app.add_option(flag, value, what + "; port 0: any free one")->capture_default_str()->type_name("HOST:PORT");
}

// One line, as the exit codes promise: messages of third parties may hold line breaks.
void PrintError(const std::string& program, std::string message) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::cerr << program << ": error: " << message << std::endl;
}
}  // namespace

void AddCommonFlags(CLI::App& app, const ServiceDefaults& defaults, CommonFlags& flags) {
  AddAddress(app, "--listen", defaults.port, "Address of the gRPC service", flags.listen);
  AddAddress(app, "--health_listen", defaults.health_port, "Address of the plaintext health service", flags.health_listen);
  AddAddress(app, "--metrics_listen", defaults.metrics_port, "Address of HTTP /metrics, /healthz and /readyz",
             flags.metrics_listen);
  app.add_option("--config", flags.config, "Experiment (text proto)")->type_name("FILE");
  app.add_option("--set", flags.set, "Sets one field of the experiment; may be repeated")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  app.add_option("--log_level", flags.log_level, "debug, info, warning, error or off")->capture_default_str();
}

int RunProgram(int argc, const char* const* argv, CLI::App& app, const std::string& program, const CommonFlags& flags,
               const std::function<absl::Status()>& body) {
  BlockShutdownSignals();
  app.name(program);
  app.set_version_flag("--version", absl::StrCat(program, " ", kVersion));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    PrintError(program, error.what());
    return 2;
  }
  if (absl::Status status = InitLogging(program, flags.log_level); !status.ok()) {
    PrintError(program, std::string(status.message()));
    return 2;
  }
  if (absl::Status status = body(); !status.ok()) {
    PrintError(program, std::string(status.message()));
    return 1;
  }
  return 0;
}

HostOptions MakeHostOptions(const ServiceDefaults& defaults, const CommonFlags& flags) {
  HostOptions options;
  options.name = defaults.name;
  options.listen = flags.listen;
  options.health_listen = flags.health_listen;
  options.metrics_listen = flags.metrics_listen;
  options.registry = std::make_shared<prometheus::Registry>();
  return options;
}

void AwaitShutdown(ServiceHost& host, const std::string& name, const std::function<void()>& drain) {
  LogInfo("{} serving port={} health_port={} metrics_port={}", name, host.port(), host.health_port(), host.metrics_port());
  const int signal_number = WaitForShutdownSignal();
  LogInfo("{} draining signal={}", name, signal_number);
  host.SetReady(false);
  drain();
  host.Shutdown(absl::Seconds(10));
  LogInfo("{} stopped", name);
}

}  // namespace orrery
