// The one text form of a ChunkInfo, shared by the file and the Redis store (docs/replay_storage.md), and the checks that
// every store makes on a chunk.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "libs/replay/store.h"

namespace orrery {

// "episode first_row rows mode end specification_hash generation counter reward_sum payload_bytes task": decimal
// numbers but for the hash, which is 16 hexadecimal digits. reward_sum keeps every bit (not-a-number becomes "nan").
std::string InfoText(const ChunkInfo& info);
// DATA_LOSS for anything else.
absl::StatusOr<ChunkInfo> ParseInfoText(absl::string_view text);

// For people: "random", "train" or "evaluate"; "open", "terminated" or "truncated".
const char* Name(EpisodeMode mode);
const char* Name(EpisodeEnd end);
// For people: "chunk of episode 3 at row 50".
std::string Place(const ChunkKey& key);

// Orders as the key does: 16 hexadecimal digits of the episode, ':', 16 of the first row.
std::string KeyText(const ChunkKey& key);
absl::StatusOr<ChunkKey> ParseKeyText(absl::string_view text);

// INVALID_ARGUMENT unless numbers are in range and payload_bytes is the size of the payload.
absl::Status CheckChunk(const Chunk& chunk);
// What a store answers to a chunk whose key it has with other contents.
absl::Status OtherContents(const ChunkKey& key);
// INVALID_ARGUMENT unless `name` has 1 to 64 letters, digits, '_', '-' and '.', and is not "." or "..".
absl::Status CheckName(absl::string_view what, absl::string_view name);

// 64 random bits as 16 hexadecimal digits: identity of a run or a data set.
std::string RandomIdentity();

}  // namespace orrery
