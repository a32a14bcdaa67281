// Rows of an environment, recorded once, that the benchmarks of replay append again and again.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/base/array.h"
#include "libs/config/config.h"
#include "libs/replay/run_coordinator.h"
#include "libs/replay/store.h"

namespace orrery {

// Consecutive chunks of one episode's rows, as an actor would send them.
struct RecordedRows {
  struct Part {
    ArrayMap fields;      // as chunk_codec.h says
    std::string payload;  // the same, encoded
    double reward_sum = 0;
  };
  std::vector<Part> parts;  // at least one
  int part_rows = 0;        // of each: replay.chunk_rows
  uint64_t specification_hash = 0;
};

// Plays the experiment's (first) task with random actions until there are at least kRecordedRows rows in whole chunks. Where it
// ends sooner it begins anew; the rows still count as those of one episode. Errors as MakeEnvironment's.
inline constexpr int kRecordedRows = 500;
absl::StatusOr<RecordedRows> RecordRows(const config::v1::Experiment& experiment);

// The `index`-th chunk of an episode of these rows, with the given payload; the last one truncates it.
Chunk MakeChunk(const RecordedRows& recorded, const EpisodeAssignment& episode, size_t index, std::string payload);

}  // namespace orrery
