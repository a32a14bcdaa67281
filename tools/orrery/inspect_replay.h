// orrery inspect replay: what a run's experience holds, episode by episode.
#pragma once

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "libs/replay/store.h"

namespace orrery {

struct InspectReplayOptions {
  bool json = false;               // one object a line instead of a table
  std::optional<int64_t> episode;  // writes this episode's rows to `rows_out`
  std::string rows_out;            // safetensors: action [T, A], reward [T], is_first [T], is_terminal [T] and every modality
};

// One line for each episode (mode, end, rows, return, bytes, snapshot), then the totals. An episode whose beginning was evicted
// or that has a gap is listed as it is: `first_row`, and `gaps` with the number of rows that are missing inside.
// NOT_FOUND: the store has no such episode; FAILED_PRECONDITION: rows of it are missing inside. Errors of the store as they are.
absl::Status InspectReplay(Store& store, const InspectReplayOptions& options, std::ostream& out);

}  // namespace orrery
