// Domain values of replay <-> their protos, with every field checked, and snapshots <-> parts.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "libs/replay/store.h"
#include "orrery/common/v1/snapshot.pb.h"
#include "orrery/replay/v1/replay.pb.h"

namespace orrery {

common::v1::SnapshotVersion ToProto(const SnapshotVersion& version);
// INVALID_ARGUMENT for a negative number. An unset proto is {0, 0}.
absl::StatusOr<SnapshotVersion> FromProto(const common::v1::SnapshotVersion& version);

replay::v1::EpisodeMode ToProto(EpisodeMode mode);
absl::StatusOr<EpisodeMode> FromProto(replay::v1::EpisodeMode mode);
replay::v1::EpisodeEnd ToProto(EpisodeEnd end);
absl::StatusOr<EpisodeEnd> FromProto(replay::v1::EpisodeEnd end);

inline constexpr int kMaxChunkRows = 1000;
inline constexpr int kMaxTask = 9999;
inline constexpr int64_t kMaxPayloadBytes = int64_t{64} << 20;

replay::v1::Chunk ToProto(const Chunk& chunk);
// Checks every range of replay.proto, not what the payload decodes to. INVALID_ARGUMENT names the field.
absl::StatusOr<Chunk> FromProto(const replay::v1::Chunk& chunk);
absl::StatusOr<Chunk> FromProto(replay::v1::Chunk&& chunk);

replay::v1::ChunkKey ToProto(const ChunkKey& key);

// What ListEpisodes tells of an episode with these chunks: at least one, by row.
replay::v1::EpisodeSummary Summarise(absl::Span<const ChunkInfo> chunks);

inline constexpr int64_t kSnapshotPartBytes = int64_t{1} << 20;
inline constexpr int64_t kMaxSnapshotBytes = int64_t{2} << 30;

// Calls `send` with each part in order until it returns false. INVALID_ARGUMENT for a file of less than 8 bytes;
// UNAVAILABLE when `send` returned false.
absl::Status SplitSnapshot(const Store::Snapshot& snapshot,
                           const std::function<bool(const common::v1::SnapshotPart&)>& send);

// Puts the parts of one snapshot together. Not thread-safe. Memory grows with the parts received, not with what they claim.
class SnapshotAssembler {
 public:
  // True when the snapshot is complete and its checksum right: then Take it. INVALID_ARGUMENT for a part that does not
  // follow the one before, DATA_LOSS for a wrong checksum. After an error or Take, the next part must be a first one.
  absl::StatusOr<bool> Add(const common::v1::SnapshotPart& part);
  Store::Snapshot Take();
  // Nothing of a snapshot is held.
  bool empty() const { return snapshot_.file.empty(); }

 private:
  absl::Status CheckPart(const common::v1::SnapshotPart& part) const;

  Store::Snapshot snapshot_;
  int64_t total_bytes_ = 0;
  uint32_t checksum_ = 0;
};

}  // namespace orrery
