// What is stored, by episode.
#pragma once

#include <cstdint>
#include <map>

#include "absl/status/statusor.h"
#include "libs/replay/store.h"

namespace orrery {

// Live chunks by episode and first row.
using LiveEpisodeMap = std::map<int64_t, std::map<int64_t, ChunkInfo>>;

// Reads the change log from its beginning to where nothing newer is there.
absl::StatusOr<LiveEpisodeMap> LiveEpisodes(Store& store);

}  // namespace orrery
