// Counts a store's failures.
#pragma once

#include <prometheus/registry.h>

#include <memory>

#include "libs/replay/store.h"

namespace orrery {

// Forwards to `store` (not owned) and counts in replay_store_errors_total{operation} each status that says the store did not
// work; answers such as NOT_FOUND, ALREADY_EXISTS, ABORTED and OUT_OF_RANGE are not failures. Thread-safe.
std::unique_ptr<Store> MakeMeteredStore(Store* store, prometheus::Registry& registry);

}  // namespace orrery
