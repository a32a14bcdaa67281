// How many processors this process may use.
#pragma once

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace orrery {

// Processors worth of time that cgroup v2 grants: the smallest `cpu.max` from the process's group up to the root.
// `root` is where cgroups are mounted, `self` the contents of /proc/self/cgroup. nullopt: no limit found.
std::optional<double> CgroupCpuLimit(const std::string& root, absl::string_view self);

// Processors that this process may use, at least 1: its scheduling affinity and its cgroup's limit (rounded up), whichever
// is less. A container that gets two of 64 processors runs two threads, not 64.
int AvailableCpus();

// What a flag --threads means: so many, or with 0 as many as AvailableCpus.
inline int ThreadsOf(int flag) { return flag > 0 ? flag : AvailableCpus(); }

}  // namespace orrery
