// A store in a folder of this machine; the default of `orrery train`.
#pragma once

#include <memory>
#include <string>

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

}  // namespace orrery
