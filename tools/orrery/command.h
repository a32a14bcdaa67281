// The subcommands of `orrery`: each declares its flags on the application and leaves a body to run after parsing.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>

#include "absl/status/status.h"

namespace orrery {

// Runs the chosen command; set by the callback of the subcommand that was named on the command line.
using Command = std::function<absl::Status()>;

void AddTrainCommand(CLI::App& app, Command& command);
void AddEvalCommand(CLI::App& app, Command& command);
void AddInspectCommand(CLI::App& app, Command& command);
void AddReplayCommand(CLI::App& app, Command& command);
void AddPlannerCommand(CLI::App& app, Command& command);
void AddBenchCommand(CLI::App& app, Command& command);
void AddDoctorCommand(CLI::App& app, Command& command);
void AddEnvCommand(CLI::App& app, Command& command);

// Declares --threads on a command; 0, the default: as many as there are processors available.
void AddThreadsFlag(CLI::App& command, int& threads, const std::string& what = "Threads of LibTorch");
// Sets LibTorch's thread counts: call before its first use.
void SetTorchThreads(int threads);

// Lets Ctrl-C and SIGTERM end the process again, after main has blocked them for `train`.
void UnblockShutdownSignals();

}  // namespace orrery
