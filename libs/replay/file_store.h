// A store in a folder of this machine; the default of `orrery train`.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/base/clock.h"
#include "libs/replay/store.h"

namespace orrery {

struct FileStoreOptions {
  std::string folder;  // made if it is not there
  int64_t segment_bytes = int64_t{64} << 20;  // a segment file that is at least this large is closed
  int change_log_length = 100000;
};

// Opens or makes the data set in `folder` (layout: docs/replay_storage.md). The tail of the last segment that a crash left
// incomplete is cut off. FAILED_PRECONDITION: another process has it open, or another format version made it. DATA_LOSS
// names the damaged file and the place. `clock` must outlive the store.
absl::StatusOr<std::unique_ptr<Store>> OpenFileStore(const FileStoreOptions& options, Clock& clock = Clock::Real());

// The data sets in the folders of `parent`, as ListDataSets of store.h. Changes nothing. One that cannot be read is listed all the
// same, with what could be counted and a warning in the log.
absl::StatusOr<std::vector<DataSetSummary>> ListFileDataSets(const std::string& parent);
// Removes the data set in `folder`, and the folder unless there are other files in it. NOT_FOUND: there is none.
// FAILED_PRECONDITION: a process has it open, or another format version made it.
absl::Status DeleteFileDataSet(const std::string& folder);

}  // namespace orrery
