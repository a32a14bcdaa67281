// orrery env: environments for a program in another language, its parent.
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <string>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "libs/base/status.h"
#include "libs/envs/vector_environment.h"
#include "tools/orrery/command.h"
#include "tools/orrery/env_server.h"

namespace orrery {
namespace {

struct Flags {
  VectorEnvironment::Options options;
  std::string quality = "fast";
  double timeout = 60;
};

absl::Status Run(const Flags& flags) {
  if (isatty(STDOUT_FILENO) != 0) {
    return absl::FailedPreconditionError(
        "standard output is a terminal: this command talks to the program that starts it, such as orrery.make_vec of Python");
  }
  VectorEnvironment::Options options = flags.options;
  options.environment.quality =
      flags.quality == "reference" ? EnvironmentOptions::Quality::kReference : EnvironmentOptions::Quality::kFast;
  options.timeout = absl::Seconds(flags.timeout);
  // Whatever else is printed must not get into the stream.
  const int out = dup(STDOUT_FILENO);
  if (out < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) return absl::ErrnoToStatus(errno, "standard output");
  const absl::Cleanup closes = [out] { close(out); };
  UnblockShutdownSignals();
  ASSIGN_OR_RETURN(const std::unique_ptr<VectorEnvironment> environments, VectorEnvironment::Create(std::move(options)));
  return ServeEnvironments(*environments, STDIN_FILENO, out);
}

}  // namespace

void AddEnvCommand(CLI::App& app, Command& command) {
  CLI::App* env = app.add_subcommand(
      "env", "Environments for the program that starts this one, such as orrery.make_vec of Python (messages on standard input "
             "and output)");
  const auto flags = std::make_shared<Flags>();
  VectorEnvironment::Options& options = flags->options;
  env->add_option("--task", options.environment.task, "Task")->required();
  env->add_option("--num_envs", options.size, "Environments that step in parallel")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  env->add_option("--action_repeat", options.environment.action_repeat, "Simulator steps per action")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  env->add_option("--image_size", options.environment.image_size, "Height and width of the pictures")
      ->check(CLI::Range(32, 128))
      ->capture_default_str();
  env->add_option("--time_limit", options.environment.time_limit, "Simulator steps of an episode; 0: the task's own")
      ->check(CLI::Range(0, 1000000000))
      ->capture_default_str();
  env->add_option("--quality", flags->quality, "Rendering: fast or reference")
      ->check(CLI::IsMember({"fast", "reference"}))
      ->capture_default_str();
  env->add_option("--timeout", flags->timeout, "Seconds after which a call of an environment has failed")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  env->callback([&command, flags] { command = [flags] { return Run(*flags); }; });
}

}  // namespace orrery
