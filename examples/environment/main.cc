// orrery-actor with one more task: "thermostat".
#include <cstdio>
#include <memory>

#include "libs/envs/environment.h"
#include "services/actor/actor_main.h"
#include "thermostat.h"

int main(int argc, char** argv) {
  // Action repeat, time limit, scaling and checks of actions come with MakeSimulatorEnvironment.
  const auto make = [](const orrery::EnvironmentOptions& options) -> absl::StatusOr<std::unique_ptr<orrery::Environment>> {
    return orrery::MakeSimulatorEnvironment(std::make_unique<Thermostat>(options.image_size), options.image_size,
                                            options.action_repeat, options.time_limit, options.action_size);
  };
  if (const absl::Status status = orrery::RegisterEnvironment("thermostat", make); !status.ok()) {
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    return 1;
  }
  return orrery::ActorMain(argc, argv);
}
