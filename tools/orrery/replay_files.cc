#include "tools/orrery/replay_files.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/client/chunk_proto.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/chunk_text.h"
#include "libs/replay/live_episodes.h"
#include "libs/replay/run_coordinator.h"
#include "libs/tensors/safetensors.h"
#include "libs/tensors/tensors.h"

namespace orrery {
namespace {

constexpr char kFormat[] = "orrery-episode 1";
constexpr size_t kChunksAtOnce = 32;
constexpr int kPage = 1000;
constexpr absl::Duration kCallTimeout = absl::Seconds(60);

class StoreSource : public EpisodeSource {
 public:
  explicit StoreSource(Store* store) : store_(store) {}

  absl::StatusOr<std::vector<int64_t>> List(int64_t first, int64_t last, std::optional<EpisodeMode> mode) override {
    ASSIGN_OR_RETURN(infos_, LiveEpisodes(*store_));
    std::vector<int64_t> ids;
    for (const auto& [id, chunks] : infos_) {
      const bool wanted = !mode.has_value() || chunks.begin()->second.mode == *mode;
      if (id >= first && id <= last && wanted) ids.push_back(id);
    }
    return ids;
  }

  absl::StatusOr<std::vector<Chunk>> Read(int64_t episode_id) override {
    const auto found = infos_.find(episode_id);
    if (found == infos_.end()) return absl::NotFoundError(absl::StrCat("episode ", episode_id, " is not stored"));
    std::vector<ChunkKey> keys;
    for (const auto& [row, info] : found->second) keys.push_back(info.key);
    std::vector<Chunk> episode;
    for (size_t i = 0; i < keys.size(); i += kChunksAtOnce) {
      ASSIGN_OR_RETURN(std::vector<std::optional<Chunk>> chunks,
                       store_->Read(absl::MakeConstSpan(keys).subspan(i, kChunksAtOnce)));
      for (std::optional<Chunk>& chunk : chunks) {
        if (!chunk.has_value()) return absl::NotFoundError(absl::StrCat("a chunk of episode ", episode_id, " was evicted"));
        episode.push_back(*std::move(chunk));
      }
    }
    return episode;
  }

 private:
  Store* const store_;
  LiveEpisodeMap infos_;
};

class ServiceSource : public EpisodeSource {
 public:
  explicit ServiceSource(ReplayClient* client) : client_(client) {}

  absl::StatusOr<std::vector<int64_t>> List(int64_t first, int64_t last, std::optional<EpisodeMode> mode) override {
    const replay::v1::EpisodeMode wanted = mode.has_value() ? ToProto(*mode) : replay::v1::EPISODE_MODE_UNSPECIFIED;
    std::vector<int64_t> ids;
    do {
      ASSIGN_OR_RETURN(const replay::v1::ListEpisodesResponse page,
                       client_->ListEpisodes(first, kPage, wanted, absl::Now() + kCallTimeout));
      for (const replay::v1::EpisodeSummary& episode : page.episodes()) {
        if (episode.episode_id() <= last) ids.push_back(episode.episode_id());
      }
      first = page.next_episode_id();
    } while (first != 0 && first <= last);
    return ids;
  }

  absl::StatusOr<std::vector<Chunk>> Read(int64_t episode_id) override {
    return client_->GetEpisode(episode_id, absl::Now() + kCallTimeout);
  }

 private:
  ReplayClient* const client_;
};

// All rows of the chunks, one array for each field.
absl::StatusOr<ArrayMap> JoinRows(const std::vector<Chunk>& chunks) {
  ArrayMap all;
  for (const Chunk& chunk : chunks) {
    const std::string place = absl::StrCat("episode ", chunk.info.key.episode_id, " row ", chunk.info.key.first_row);
    absl::StatusOr<ArrayMap> rows = DecodeRows(chunk.payload, chunk.info.rows);
    if (!rows.ok()) return Annotate(rows.status(), place);
    if (all.empty()) {
      all = *std::move(rows);
      continue;
    }
    for (auto& [name, whole] : all) {
      const auto part = rows->find(name);
      if (part == rows->end() || rows->size() != all.size() || part->second.dtype != whole.dtype ||
          !std::equal(part->second.shape.begin() + 1, part->second.shape.end(), whole.shape.begin() + 1, whole.shape.end())) {
        return absl::FailedPreconditionError(absl::StrCat(place, ": field \"", name, "\" is not as in the chunks before it"));
      }
      whole.shape[0] += part->second.shape[0];
      whole.bytes += part->second.bytes;
    }
  }
  return all;
}

absl::StatusOr<SafeTensors> ToFile(const std::string& run, const std::vector<Chunk>& chunks) {
  ASSIGN_OR_RETURN(const ArrayMap rows, JoinRows(chunks));
  SafeTensors file;
  for (const auto& [name, array] : rows) file.tensors[name] = ToTorch(array);
  double episode_return = 0;
  SnapshotVersion newest;
  std::vector<std::string> infos;
  for (const Chunk& chunk : chunks) {
    episode_return += chunk.info.reward_sum;
    newest = std::max(newest, chunk.info.snapshot_version);
    infos.push_back(InfoText(chunk.info));
  }
  const ChunkInfo& first = chunks.front().info;
  file.metadata = {{"format", kFormat},
                   {"run", run},
                   {"run_id", chunks.front().run_id},
                   {"episode", absl::StrCat(first.key.episode_id)},
                   {"mode", Name(first.mode)},
                   {"end", Name(chunks.back().info.end)},
                   {"task", absl::StrCat(first.task)},
                   {"first_row", absl::StrCat(first.key.first_row)},
                   {"specification_hash", absl::StrFormat("%016x", first.specification_hash)},
                   {"snapshot_version", absl::StrCat(newest.generation, " ", newest.counter)},
                   {"return", absl::StrFormat("%.17g", episode_return)},
                   {"chunks", absl::StrJoin(infos, "\n")}};
  return file;
}

// Paths of the episode files, by name; none when there is no such folder.
absl::StatusOr<std::vector<std::string>> EpisodeFiles(const std::string& folder) {
  std::vector<std::string> paths;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (absl::StartsWith(name, "episode-") && absl::EndsWith(name, ".safetensors")) paths.push_back(entry->path().string());
  }
  if (error && error != std::errc::no_such_file_or_directory) {
    return absl::FailedPreconditionError(absl::StrCat(folder, ": ", error.message()));
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

void Count(const std::vector<Chunk>& chunks, EpisodeTotals& totals) {
  ++totals.episodes;
  totals.chunks += static_cast<int64_t>(chunks.size());
  for (const Chunk& chunk : chunks) {
    totals.rows += chunk.info.rows;
    totals.bytes += chunk.info.payload_bytes;
  }
}

// A metadata entry of the file.
absl::StatusOr<std::string> Entry(const SafeTensors& file, const std::string& name) {
  const auto found = file.metadata.find(name);
  if (found != file.metadata.end()) return found->second;
  return absl::InvalidArgumentError(
      absl::StrCat("metadata \"", name, "\" is missing: expected a file written by orrery replay export"));
}

// Fields that all have `rows` rows and are what a learner can use.
absl::StatusOr<ArrayMap> RowsOf(const SafeTensors& file, int64_t rows) {
  ArrayMap fields;
  for (const auto& [name, tensor] : file.tensors) {
    absl::StatusOr<Array> array = ToArray(tensor);
    if (!array.ok()) return Annotate(array.status(), absl::StrCat("field \"", name, "\""));
    if (array->shape.empty() || array->shape[0] != rows) {
      return absl::InvalidArgumentError(absl::StrCat("field \"", name, "\" is ", ShapeString(array->shape), ": expected ", rows,
                                                     " rows, as metadata \"chunks\" says"));
    }
    fields[name] = *std::move(array);
  }
  RETURN_IF_ERROR(CheckRows(fields));
  return fields;
}

// The descriptions of the chunks, by row and all of one episode.
absl::StatusOr<std::vector<ChunkInfo>> InfosOf(const SafeTensors& file) {
  ASSIGN_OR_RETURN(const std::string text, Entry(file, "chunks"));
  ASSIGN_OR_RETURN(const std::string episode, Entry(file, "episode"));
  std::vector<ChunkInfo> infos;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    absl::StatusOr<ChunkInfo> info = ParseInfoText(line);
    if (!info.ok()) return Annotate(info.status(), "metadata \"chunks\"");
    if (absl::StrCat(info->key.episode_id) != episode) {
      return absl::InvalidArgumentError(absl::StrCat("metadata \"chunks\" names episode ", info->key.episode_id, ": expected ",
                                                     episode, ", as metadata \"episode\" says"));
    }
    if (!infos.empty() && info->key.first_row < infos.back().key.first_row + infos.back().rows) {
      return absl::InvalidArgumentError(absl::StrCat("metadata \"chunks\" has row ", info->key.first_row, " after row ",
                                                     infos.back().key.first_row + infos.back().rows - 1));
    }
    infos.push_back(*info);
  }
  return infos;
}

absl::StatusOr<std::vector<Chunk>> ToChunks(const SafeTensors& file) {
  ASSIGN_OR_RETURN(const std::string format, Entry(file, "format"));
  if (format != kFormat) {
    return absl::InvalidArgumentError(absl::StrCat("metadata \"format\" is \"", format, "\": expected \"", kFormat, "\""));
  }
  ASSIGN_OR_RETURN(const std::string run_id, Entry(file, "run_id"));
  ASSIGN_OR_RETURN(const std::vector<ChunkInfo> infos, InfosOf(file));
  int64_t total = 0;
  for (const ChunkInfo& info : infos) total += info.rows;
  ASSIGN_OR_RETURN(const ArrayMap rows, RowsOf(file, total));
  std::vector<Chunk> chunks;
  int64_t row = 0;
  for (const ChunkInfo& info : infos) {
    ArrayMap part;
    for (const auto& [name, array] : rows) {
      const size_t row_bytes = array.bytes.size() / static_cast<size_t>(total);
      Array& slice = part[name] = Array{array.dtype, array.shape, array.bytes.substr(row * row_bytes, info.rows * row_bytes)};
      slice.shape[0] = info.rows;
    }
    Chunk& chunk = chunks.emplace_back(Chunk{run_id, info, {}});
    ASSIGN_OR_RETURN(chunk.payload, EncodeRows(part));
    chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
    // What the service would refuse must not get in by this way either.
    RETURN_IF_ERROR(FromProto(ToProto(chunk)).status());
    row += info.rows;
  }
  return chunks;
}

// FAILED_PRECONDITION unless the chunks are of the run.
absl::Status AddTo(PlayedRun& run, const std::vector<Chunk>& chunks) {
  const Chunk& last = chunks.back();
  if (run.run_id.empty()) run.run_id = last.run_id;
  if (last.run_id != run.run_id) {
    return absl::FailedPreconditionError(absl::StrCat("metadata \"run_id\" is \"", last.run_id, "\": expected \"", run.run_id,
                                                      "\", the run of the data set or of the files before"));
  }
  if (run.last_episode == 0) run.specification_hash = chunks.front().info.specification_hash;
  for (const Chunk& chunk : chunks) {
    if (chunk.info.specification_hash == run.specification_hash) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("the specification hash of row ", chunk.info.key.first_row, " is ",
                     absl::StrFormat("%016x", chunk.info.specification_hash), ": expected ",
                     absl::StrFormat("%016x", run.specification_hash), ", that of the rows before"));
  }
  run.last_episode = std::max(run.last_episode, last.info.key.episode_id);
  if (last.info.mode == EpisodeMode::kEvaluate) return absl::OkStatus();
  ++run.training_episodes;
  run.training_rows += last.info.key.first_row + last.info.rows;
  return absl::OkStatus();
}

}  // namespace

std::unique_ptr<EpisodeSource> MakeStoreSource(Store* store) { return std::make_unique<StoreSource>(store); }
std::unique_ptr<EpisodeSource> MakeServiceSource(ReplayClient* client) { return std::make_unique<ServiceSource>(client); }

absl::StatusOr<EpisodeTotals> ExportEpisodes(EpisodeSource& source, const ExportOptions& options) {
  ASSIGN_OR_RETURN(const std::vector<std::string> there, EpisodeFiles(options.folder));
  if (!there.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(there[0], " is there already: expected a folder without episode files"));
  }
  ASSIGN_OR_RETURN(const std::vector<int64_t> ids, source.List(options.first, options.last, options.mode));
  if (ids.empty()) return absl::NotFoundError("no stored episode is of the numbers and the mode asked for");
  RETURN_IF_ERROR(MakeDirectory(options.folder));
  EpisodeTotals totals;
  for (const int64_t id : ids) {
    const absl::StatusOr<std::vector<Chunk>> chunks = source.Read(id);
    if (absl::IsNotFound(chunks.status())) continue;  // evicted meanwhile
    RETURN_IF_ERROR(chunks.status());
    ASSIGN_OR_RETURN(const SafeTensors file, ToFile(options.run, *chunks));
    RETURN_IF_ERROR(SaveSafeTensors(absl::StrFormat("%s/episode-%09d.safetensors", options.folder, id), file));
    Count(*chunks, totals);
  }
  return totals;
}

absl::StatusOr<EpisodeTotals> ImportEpisodes(const std::string& folder, Store& store) {
  ASSIGN_OR_RETURN(const std::vector<std::string> paths, EpisodeFiles(folder));
  if (paths.empty()) return absl::NotFoundError(absl::StrCat(folder, ": expected files episode-….safetensors in it"));
  PlayedRun run;
  ASSIGN_OR_RETURN(run.run_id, RunCoordinator::RunIdOf(store));
  const bool has_state = !run.run_id.empty();
  EpisodeTotals totals;
  for (const std::string& path : paths) {
    ASSIGN_OR_RETURN(const SafeTensors file, LoadSafeTensors(path));
    absl::StatusOr<std::vector<Chunk>> chunks = ToChunks(file);
    if (!chunks.ok()) return Annotate(chunks.status(), path);
    RETURN_IF_ERROR(Annotate(AddTo(run, *chunks), path));
    for (const Chunk& chunk : *chunks) RETURN_IF_ERROR(Annotate(store.Append(chunk), path));
    Count(*chunks, totals);
  }
  if (!has_state) RETURN_IF_ERROR(RunCoordinator::WritePlayed(store, run));
  return totals;
}

}  // namespace orrery
