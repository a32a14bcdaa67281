// One snapshot as it is served: everything that answers a request, and never changes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "libs/planning/planner.h"
#include "libs/replay/store.h"
#include "libs/serving/belief.h"
#include "libs/world_model/snapshot.h"

namespace orrery {

// Constant after construction, so any number of threads may read it; shared between those that still use it.
struct ServedModel {
  std::string name;  // of the model: the run's name
  SnapshotVersion version;
  SnapshotInfo info;
  std::shared_ptr<const WorldModel> model;  // on the engine's device
  std::unique_ptr<const Planner> planner;
  std::shared_ptr<RowWorkers> workers;  // share what is computed on a CPU
  uint64_t structure_hash = 0;

  BeliefShape belief_shape() const {
    return {name,
            structure_hash,
            model->deterministic_size(),
            model->stochastic_size(),
            model->action_size(),
            planner->warm_start_horizon()};
  }
};

}  // namespace orrery
