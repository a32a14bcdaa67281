// Chunks for tests.
#pragma once

#include <string>

#include "libs/replay/store.h"

namespace orrery {

// A training chunk that goes on; its payload is not an encoded one.
inline Chunk MakeChunk(int64_t episode, int64_t first_row, int rows = 10, const std::string& payload = "payload") {
  Chunk chunk;
  chunk.run_id = "0123456789abcdef";
  chunk.info.key = {episode, first_row};
  chunk.info.rows = rows;
  chunk.info.mode = EpisodeMode::kTrain;
  chunk.info.end = EpisodeEnd::kContinues;
  chunk.info.specification_hash = 0xfedcba9876543210;
  chunk.info.snapshot_version = {3, 400};
  chunk.info.reward_sum = 0.1 + static_cast<double>(first_row);
  chunk.payload = payload;
  chunk.info.payload_bytes = static_cast<int64_t>(payload.size());
  return chunk;
}

}  // namespace orrery
