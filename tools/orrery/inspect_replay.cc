#include "tools/orrery/inspect_replay.h"

#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/chunk_text.h"
#include "libs/replay/live_episodes.h"
#include "libs/tensors/safetensors.h"
#include "libs/tensors/tensors.h"

namespace orrery {
namespace {

// Chunks of an episode by their first row.
using Episode = std::map<int64_t, ChunkInfo>;

struct Summary {
  int64_t first_row = 0, rows = 0, gaps = 0, bytes = 0;
  double reward_sum = 0;
  EpisodeMode mode = EpisodeMode::kTrain;
  EpisodeEnd end = EpisodeEnd::kContinues;
  SnapshotVersion version;
};

Summary Summarise(const Episode& episode) {
  Summary s;
  s.first_row = episode.begin()->first;
  int64_t next = s.first_row;
  for (const auto& [row, info] : episode) {
    s.gaps += row - next;
    next = row + info.rows;
    s.rows += info.rows;
    s.bytes += info.payload_bytes;
    s.reward_sum += info.reward_sum;
    s.mode = info.mode;
    s.end = info.end;
    s.version = std::max(s.version, info.snapshot_version);
  }
  return s;
}

void Print(int64_t id, const Summary& s, size_t chunks, bool json, std::ostream& out) {
  if (json) {
    nlohmann::ordered_json line = {{"episode", id},       {"mode", Name(s.mode)},   {"end", Name(s.end)},
                                   {"first_row", s.first_row}, {"rows", s.rows},    {"gaps", s.gaps},
                                   {"chunks", chunks},    {"return", s.reward_sum}, {"bytes", s.bytes},
                                   {"snapshot", {{"generation", s.version.generation}, {"counter", s.version.counter}}}};
    out << line.dump() << "\n";
    return;
  }
  out << absl::StreamFormat("%8d  %-8s  %-10s  %9d  %6d  %5d  %6d  %12.3f  %10d  %d.%d\n", id, Name(s.mode), Name(s.end),
                            s.first_row, s.rows, s.gaps, chunks, s.reward_sum, s.bytes, s.version.generation,
                            s.version.counter);
}

// All rows of an episode, one array for each field.
absl::StatusOr<ArrayMap> EpisodeRows(Store& store, int64_t id, const Episode& episode) {
  std::vector<ChunkKey> keys;
  for (const auto& [row, info] : episode) keys.push_back(info.key);
  ASSIGN_OR_RETURN(const auto chunks, store.Read(keys));
  ArrayMap all;
  for (const std::optional<Chunk>& chunk : chunks) {
    if (!chunk.has_value()) return absl::NotFoundError(absl::StrCat("episode ", id, " was evicted meanwhile"));
    ASSIGN_OR_RETURN(const ArrayMap rows, DecodeRows(chunk->payload, chunk->info.rows));
    for (const auto& [name, array] : rows) {
      Array& whole = all.try_emplace(name, Array{array.dtype, array.shape, ""}).first->second;
      if (whole.bytes.empty()) whole.shape[0] = 0;
      whole.shape[0] += array.shape[0];
      whole.bytes += array.bytes;
    }
  }
  return all;
}

absl::Status WriteEpisode(Store& store, const std::map<int64_t, Episode>& episodes, int64_t id, const std::string& path) {
  const auto found = episodes.find(id);
  if (found == episodes.end()) {
    return absl::NotFoundError(absl::StrCat("episode ", id, " is not there, expected one of the ", episodes.size(), " listed"));
  }
  if (const int64_t gaps = Summarise(found->second).gaps; gaps > 0) {
    return absl::FailedPreconditionError(absl::StrCat("episode ", id, " lacks ", gaps, " rows inside"));
  }
  ASSIGN_OR_RETURN(const ArrayMap rows, EpisodeRows(store, id, found->second));
  SafeTensors file;
  for (const auto& [name, array] : rows) file.tensors[name] = ToTorch(array);
  file.metadata["episode"] = absl::StrCat(id);
  file.metadata["first_row"] = absl::StrCat(found->second.begin()->first);
  return SaveSafeTensors(path, file);
}

}  // namespace

absl::Status InspectReplay(Store& store, const InspectReplayOptions& options, std::ostream& out) {
  ASSIGN_OR_RETURN(const auto episodes, LiveEpisodes(store));
  if (options.episode.has_value()) return WriteEpisode(store, episodes, *options.episode, options.rows_out);
  if (!options.json) {
    out << absl::StreamFormat("%8s  %-8s  %-10s  %9s  %6s  %5s  %6s  %12s  %10s  %s\n", "episode", "mode", "end", "first row",
                              "rows", "gaps", "chunks", "return", "bytes", "snapshot");
  }
  int64_t rows = 0, bytes = 0;
  for (const auto& [id, episode] : episodes) {
    const Summary summary = Summarise(episode);
    Print(id, summary, episode.size(), options.json, out);
    rows += summary.rows;
    bytes += summary.bytes;
  }
  if (!options.json) out << absl::StreamFormat("%d episodes, %d rows, %d bytes\n", episodes.size(), rows, bytes);
  return absl::OkStatus();
}

}  // namespace orrery
