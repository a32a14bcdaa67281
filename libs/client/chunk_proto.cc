#include "libs/client/chunk_proto.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/file.h"
#include "libs/base/status.h"

namespace orrery {
namespace {
absl::Status CheckRange(absl::string_view field, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("chunk.", field, " is ", value, ": expected ", low, " to ", high));
}

// Everything but the payload's bytes.
absl::StatusOr<Chunk> InfoFromProto(const replay::v1::Chunk& proto) {
  constexpr int64_t kLargest = int64_t{1} << 62;
  Chunk chunk;
  if (proto.run_id().empty()) return absl::InvalidArgumentError("chunk.run_id is not set");
  chunk.run_id = proto.run_id();
  RETURN_IF_ERROR(CheckRange("episode_id", proto.episode_id(), 1, kLargest));
  // Far from where counts of rows of many episodes would overflow.
  RETURN_IF_ERROR(CheckRange("first_row", proto.first_row(), 0, int64_t{1} << 40));
  RETURN_IF_ERROR(CheckRange("rows", proto.rows(), 1, kMaxChunkRows));
  const int64_t payload_bytes = static_cast<int64_t>(proto.payload().size());
  RETURN_IF_ERROR(CheckRange("payload's size", payload_bytes, 1, kMaxPayloadBytes));
  chunk.info.key = {proto.episode_id(), proto.first_row()};
  chunk.info.rows = proto.rows();
  ASSIGN_OR_RETURN(chunk.info.mode, FromProto(proto.mode()));
  ASSIGN_OR_RETURN(chunk.info.end, FromProto(proto.end()));
  RETURN_IF_ERROR(CheckRange("task", proto.task(), 0, kMaxTask));
  chunk.info.task = proto.task();
  chunk.info.specification_hash = proto.specification_hash();
  ASSIGN_OR_RETURN(chunk.info.snapshot_version, FromProto(proto.snapshot_version()));
  if (!std::isfinite(proto.reward_sum())) {
    return absl::InvalidArgumentError(absl::StrCat("chunk.reward_sum is ", proto.reward_sum(), ": expected a finite number"));
  }
  chunk.info.reward_sum = proto.reward_sum();
  chunk.info.payload_bytes = payload_bytes;
  return chunk;
}
}  // namespace

common::v1::SnapshotVersion ToProto(const SnapshotVersion& version) {
  common::v1::SnapshotVersion proto;
  proto.set_generation(version.generation);
  proto.set_counter(version.counter);
  return proto;
}

absl::StatusOr<SnapshotVersion> FromProto(const common::v1::SnapshotVersion& version) {
  if (version.generation() < 0 || version.counter() < 0) {
    return absl::InvalidArgumentError(absl::StrCat("snapshot version (", version.generation(), ", ", version.counter(),
                                                   "): expected numbers of at least 0"));
  }
  return SnapshotVersion{version.generation(), version.counter()};
}

replay::v1::EpisodeMode ToProto(EpisodeMode mode) { return static_cast<replay::v1::EpisodeMode>(mode); }

absl::StatusOr<EpisodeMode> FromProto(replay::v1::EpisodeMode mode) {
  switch (mode) {
    case replay::v1::RANDOM:
      return EpisodeMode::kRandom;
    case replay::v1::TRAIN:
      return EpisodeMode::kTrain;
    case replay::v1::EVALUATE:
      return EpisodeMode::kEvaluate;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("episode mode ", static_cast<int>(mode), ": expected RANDOM, TRAIN or EVALUATE"));
  }
}

replay::v1::EpisodeEnd ToProto(EpisodeEnd end) { return static_cast<replay::v1::EpisodeEnd>(end); }

absl::StatusOr<EpisodeEnd> FromProto(replay::v1::EpisodeEnd end) {
  switch (end) {
    case replay::v1::CONTINUES:
      return EpisodeEnd::kContinues;
    case replay::v1::TERMINATED:
      return EpisodeEnd::kTerminated;
    case replay::v1::TRUNCATED:
      return EpisodeEnd::kTruncated;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("episode end ", static_cast<int>(end), ": expected CONTINUES, TERMINATED or TRUNCATED"));
  }
}

static_assert(static_cast<int>(EpisodeMode::kRandom) == replay::v1::RANDOM);
static_assert(static_cast<int>(EpisodeMode::kTrain) == replay::v1::TRAIN);
static_assert(static_cast<int>(EpisodeMode::kEvaluate) == replay::v1::EVALUATE);
static_assert(static_cast<int>(EpisodeEnd::kContinues) == replay::v1::CONTINUES);
static_assert(static_cast<int>(EpisodeEnd::kTerminated) == replay::v1::TERMINATED);
static_assert(static_cast<int>(EpisodeEnd::kTruncated) == replay::v1::TRUNCATED);

replay::v1::Chunk ToProto(const Chunk& chunk) {
  replay::v1::Chunk proto;
  proto.set_run_id(chunk.run_id);
  proto.set_episode_id(chunk.info.key.episode_id);
  proto.set_first_row(chunk.info.key.first_row);
  proto.set_rows(chunk.info.rows);
  proto.set_mode(ToProto(chunk.info.mode));
  proto.set_end(ToProto(chunk.info.end));
  proto.set_specification_hash(chunk.info.specification_hash);
  proto.set_task(chunk.info.task);
  if (chunk.info.snapshot_version != SnapshotVersion{}) {
    *proto.mutable_snapshot_version() = ToProto(chunk.info.snapshot_version);
  }
  proto.set_reward_sum(chunk.info.reward_sum);
  proto.set_payload(chunk.payload);
  return proto;
}

absl::StatusOr<Chunk> FromProto(const replay::v1::Chunk& proto) {
  ASSIGN_OR_RETURN(Chunk chunk, InfoFromProto(proto));
  chunk.payload = proto.payload();
  return chunk;
}

absl::StatusOr<Chunk> FromProto(replay::v1::Chunk&& proto) {
  ASSIGN_OR_RETURN(Chunk chunk, InfoFromProto(proto));
  chunk.payload = std::move(*proto.mutable_payload());
  return chunk;
}

replay::v1::ChunkKey ToProto(const ChunkKey& key) {
  replay::v1::ChunkKey proto;
  proto.set_episode_id(key.episode_id);
  proto.set_first_row(key.first_row);
  return proto;
}

replay::v1::EpisodeSummary Summarise(absl::Span<const ChunkInfo> chunks) {
  replay::v1::EpisodeSummary summary;
  summary.set_episode_id(chunks.front().key.episode_id);
  summary.set_mode(ToProto(chunks.front().mode));
  summary.set_end(ToProto(chunks.back().end));
  summary.set_first_row(chunks.front().key.first_row);
  summary.set_task(chunks.front().task);
  summary.set_chunks(static_cast<int32_t>(chunks.size()));
  int64_t next = summary.first_row();
  SnapshotVersion newest;
  for (const ChunkInfo& chunk : chunks) {
    summary.set_rows(summary.rows() + chunk.rows);
    summary.set_missing_rows(summary.missing_rows() + std::max<int64_t>(0, chunk.key.first_row - next));
    summary.set_reward_sum(summary.reward_sum() + chunk.reward_sum);
    summary.set_bytes(summary.bytes() + chunk.payload_bytes);
    next = std::max(next, chunk.key.first_row + chunk.rows);
    newest = std::max(newest, chunk.snapshot_version);
  }
  if (newest != SnapshotVersion{}) *summary.mutable_snapshot_version() = ToProto(newest);
  return summary;
}

absl::Status SplitSnapshot(const Store::Snapshot& snapshot,
                           const std::function<bool(const common::v1::SnapshotPart&)>& send) {
  const int64_t total = static_cast<int64_t>(snapshot.file.size());
  if (total < 8) {
    return absl::InvalidArgumentError(absl::StrCat("snapshot file of ", total, " bytes: expected at least 8"));
  }
  const uint32_t checksum = Checksum(snapshot.file);
  for (int64_t offset = 0; offset < total; offset += kSnapshotPartBytes) {
    common::v1::SnapshotPart part;
    *part.mutable_version() = ToProto(snapshot.version);
    part.set_total_bytes(total);
    part.set_checksum(checksum);
    part.set_offset(offset);
    part.set_data(snapshot.file.substr(offset, kSnapshotPartBytes));
    if (!send(part)) return absl::UnavailableError("the receiver of a snapshot went away");
  }
  return absl::OkStatus();
}

absl::Status SnapshotAssembler::CheckPart(const common::v1::SnapshotPart& part) const {
  auto invalid = [](auto... words) { return absl::InvalidArgumentError(absl::StrCat("snapshot part: ", words...)); };
  const int64_t size = static_cast<int64_t>(part.data().size());
  if (!part.has_version()) return invalid("version is not set");
  if (part.total_bytes() < 8 || part.total_bytes() > kMaxSnapshotBytes) {
    return invalid("total_bytes is ", part.total_bytes(), ": expected 8 to ", kMaxSnapshotBytes);
  }
  if (size < 1 || size > kSnapshotPartBytes) {
    return invalid("data has ", size, " bytes: expected 1 to ", kSnapshotPartBytes);
  }
  const int64_t received = static_cast<int64_t>(snapshot_.file.size());
  if (part.offset() != received) return invalid("offset is ", part.offset(), ": expected ", received);
  if (size > part.total_bytes() - received) {
    return invalid("data goes on to ", received + size, ", beyond total_bytes ", part.total_bytes());
  }
  if (empty()) return absl::OkStatus();
  const bool same = part.version().generation() == snapshot_.version.generation &&
                    part.version().counter() == snapshot_.version.counter && part.total_bytes() == total_bytes_ &&
                    part.checksum() == checksum_;
  return same ? absl::OkStatus() : invalid("version, total_bytes or checksum differ from those of the first part");
}

absl::StatusOr<bool> SnapshotAssembler::Add(const common::v1::SnapshotPart& part) {
  absl::Status status = CheckPart(part);
  absl::StatusOr<SnapshotVersion> version = FromProto(part.version());
  if (status.ok()) status = version.status();
  if (!status.ok()) {
    Take();
    return status;
  }
  if (empty()) {
    snapshot_.version = *version;
    total_bytes_ = part.total_bytes();
    checksum_ = part.checksum();
  }
  snapshot_.file.append(part.data());
  if (static_cast<int64_t>(snapshot_.file.size()) < total_bytes_) return false;
  const uint32_t checksum = Checksum(snapshot_.file);
  if (checksum == checksum_) return true;
  Take();
  return absl::DataLossError(absl::StrCat("snapshot of ", total_bytes_, " bytes has checksum ", checksum, ": expected ",
                                          checksum_));
}

Store::Snapshot SnapshotAssembler::Take() { return std::exchange(snapshot_, {}); }

}  // namespace orrery
