// A store in Redis, shared by any number of replay servers.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "libs/replay/store.h"

namespace orrery {

// Opens or makes the data set of options.run in the Redis at options.location (keys: docs/replay_storage.md).
// UNAVAILABLE names host and port. FAILED_PRECONDITION: another schema version made the data set.
absl::StatusOr<std::unique_ptr<Store>> OpenRedisStore(const StoreOptions& options);

}  // namespace orrery
