#include "libs/replay/live_episodes.h"

#include <string>

#include "libs/base/status.h"

namespace orrery {

absl::StatusOr<LiveEpisodeMap> LiveEpisodes(Store& store) {
  constexpr int kChangesAtOnce = 1000;
  LiveEpisodeMap episodes;
  std::string cursor;
  for (bool caught_up = false; !caught_up;) {
    ASSIGN_OR_RETURN(const ChangeBatch batch, store.Changes(cursor, kChangesAtOnce, absl::ZeroDuration()));
    for (const Change& change : batch.changes) {
      const ChunkKey& key = change.info.key;
      if (change.kind == Change::Kind::kAppend) {
        episodes[key.episode_id][key.first_row] = change.info;
      } else if (const auto found = episodes.find(key.episode_id); found != episodes.end()) {
        found->second.erase(key.first_row);
        if (found->second.empty()) episodes.erase(found);
      }
    }
    cursor = batch.cursor;
    caught_up = batch.caught_up;
  }
  return episodes;
}

}  // namespace orrery
