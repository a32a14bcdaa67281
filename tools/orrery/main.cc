// orrery: trains, evaluates and inspects agents from the command line.
#include <cstdio>
#include <string>

#include "libs/base/log.h"
#include "libs/base/shutdown.h"
#include "libs/base/status.h"
#include "libs/telemetry/service_main.h"
#include "tools/orrery/command.h"

namespace {

void PrintError(const std::string& message) { std::fprintf(stderr, "orrery: error: %s\n", message.c_str()); }

// Exit codes: 0 done, 1 failed, 2 wrong command line.
int Main(int argc, char** argv) {
  CLI::App app("Trains, evaluates and inspects agents that plan inside a learned world model.", "orrery");
  app.set_version_flag("--version", std::string("orrery ") + orrery::kVersion);
  app.require_subcommand(1);
  std::string log_level = "warning";
  app.add_option("--log_level", log_level, "debug, info, warning, error or off")->capture_default_str();
  orrery::Command command;
  orrery::AddTrainCommand(app, command);
  orrery::AddEvalCommand(app, command);
  orrery::AddInspectCommand(app, command);
  orrery::AddReplayCommand(app, command);
  orrery::AddPlannerCommand(app, command);
  orrery::AddBenchCommand(app, command);
  orrery::AddDoctorCommand(app, command);
  orrery::AddEnvCommand(app, command);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    PrintError(std::string(error.what()) + " (see --help)");
    return 2;
  }
  absl::Status status = orrery::InitLogging("orrery", log_level);
  if (status.ok()) status = orrery::CatchExceptions("orrery", command);
  if (status.ok()) return 0;
  PrintError(std::string(status.message()));
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  orrery::BlockShutdownSignals();
  return Main(argc, argv);
}
