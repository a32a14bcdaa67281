// Episodes as files, one safetensors file for each (docs/replay_storage.md, "Export"): for backups and other people's trainers.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/client/replay_client.h"
#include "libs/replay/store.h"

namespace orrery {

// Where episodes are read from. Not thread-safe.
class EpisodeSource {
 public:
  virtual ~EpisodeSource() = default;
  // Numbers of the stored episodes from `first` to `last`, in their order; of one mode, or of any when none is given.
  virtual absl::StatusOr<std::vector<int64_t>> List(int64_t first, int64_t last, std::optional<EpisodeMode> mode) = 0;
  // The stored chunks by row, at least one, of an episode that was listed last. NOT_FOUND: it is not there any more.
  virtual absl::StatusOr<std::vector<Chunk>> Read(int64_t episode_id) = 0;
};
// Both are not owned and must outlive the source.
std::unique_ptr<EpisodeSource> MakeStoreSource(Store* store);
std::unique_ptr<EpisodeSource> MakeServiceSource(ReplayClient* client);

struct EpisodeTotals {
  int64_t episodes = 0;
  int64_t chunks = 0;
  int64_t rows = 0;
  int64_t bytes = 0;  // of encoded chunks
};

struct ExportOptions {
  std::string run;  // name of the run, for the files
  std::string folder;
  int64_t first = 1;
  int64_t last = std::numeric_limits<int64_t>::max();
  std::optional<EpisodeMode> mode;  // none: any
};
// Writes FOLDER/episode-000000123.safetensors for each episode. One that is evicted meanwhile is left out.
// FAILED_PRECONDITION: the folder has episode files already, or an episode's chunks have different fields. NOT_FOUND: there is
// no such episode.
absl::StatusOr<EpisodeTotals> ExportEpisodes(EpisodeSource& source, const ExportOptions& options);

// Appends the episodes of a folder to a data set that is empty or of the same run, with their numbers. An empty one gets the
// state of a run that has played them, so that training can go on with it; its learner begins anew. May be repeated after an
// error. INVALID_ARGUMENT or DATA_LOSS: damaged or not such a file, with file and field; FAILED_PRECONDITION: files or data set
// belong to another run; NOT_FOUND: there are no files. Errors of the store name the file.
absl::StatusOr<EpisodeTotals> ImportEpisodes(const std::string& folder, Store& store);

}  // namespace orrery
