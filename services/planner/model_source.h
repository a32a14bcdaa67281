// Where a planner gets the snapshots of a model from, as a flag says it.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace orrery {

struct ModelSource {
  std::string name;      // that requests give; empty: the snapshots' own
  std::string snapshot;  // file to serve until a newer one comes; empty: none
  std::string learner;   // HOST:PORT to subscribe to; empty: none
  std::string replay;    // HOST:PORT to ask while no learner is there; empty: none
  std::string run;       // of learner and replay
};

// "NAME=KIND:VALUE[,KIND:VALUE…]", where KIND is file, learner, replay or run, each at most once and at least one of the first
// three; run is NAME unless given: "base=file:base.safetensors", "new=learner:10.0.0.2:7102,replay:10.0.0.2:7101,run:cheetah-2".
// A path with a comma cannot be given. INVALID_ARGUMENT names the text and what was expected.
absl::StatusOr<ModelSource> ParseModelSource(const std::string& text);

}  // namespace orrery
