// A store in a Redis or a Redis Cluster, shared by any number of replay servers.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/replay/store.h"

namespace orrery {

// Opens or makes the data set of options.run in the Redis at options.location (keys: docs/replay_storage.md).
// UNAVAILABLE names host and port. FAILED_PRECONDITION: another schema version made the data set, or redis:// leads to a
// cluster, or redis-cluster:// to none. PERMISSION_DENIED: the password is wrong or missing.
absl::StatusOr<std::unique_ptr<Store>> OpenRedisStore(const StoreOptions& options);

// As ListDataSets and DeleteDataSet of store.h; `timeout` is for each step. A data set that cannot be read (another schema
// version) is listed all the same, with what could be counted and a warning in the log. While a data set is deleted its slots
// must not move, nor may a replay server have it open: one that goes on writing is noticed (FAILED_PRECONDITION), one that writes
// later leaves keys behind, which a second call deletes.
absl::StatusOr<std::vector<DataSetSummary>> ListRedisDataSets(const std::string& location, absl::Duration timeout);
absl::Status DeleteRedisDataSet(const StoreOptions& options);

}  // namespace orrery
