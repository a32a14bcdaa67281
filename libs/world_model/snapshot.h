// A model on disk and on the wire: one safetensors file, self-describing (docs/snapshot_format.md).
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// `__metadata__` of a snapshot. A file made elsewhere needs `orrery.model` only.
struct SnapshotInfo {
  config::v1::Model model;      // orrery.model
  config::v1::Planner planner;  // orrery.planner; default: CEM with the paper's sizes
  std::string run;              // orrery.run; empty: not said
  int64_t generation = 0;       // orrery.generation
  int64_t counter = 0;          // orrery.counter: updates made
};

struct ModelSnapshot {
  SnapshotInfo info;
  std::shared_ptr<WorldModel> model;  // on CPU
};

// The whole file.
absl::StatusOr<std::string> SerializeSnapshot(const WorldModel& model, const SnapshotInfo& info);
// INVALID_ARGUMENT names the first parameter that is missing, unknown, of another shape or not finite; DATA_LOSS a
// damaged file.
absl::StatusOr<ModelSnapshot> ParseSnapshot(absl::string_view file);
// The same from a path; errors name it.
absl::StatusOr<ModelSnapshot> LoadSnapshot(const std::string& path);

}  // namespace orrery
