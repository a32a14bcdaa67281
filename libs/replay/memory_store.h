// A store in this process's memory.
#pragma once

#include <memory>

#include "libs/base/clock.h"
#include "libs/replay/store.h"

namespace orrery {

// `clock` must outlive the store; Now() asks it.
std::unique_ptr<Store> MakeMemoryStore(const StoreOptions& options = {}, Clock& clock = Clock::Real());

}  // namespace orrery
