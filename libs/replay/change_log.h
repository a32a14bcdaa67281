// The live chunks and the change log of a store that one process holds (memory, file).
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/replay/store.h"

namespace orrery {

// Thread-safe. Keeps the newest `capacity` changes; a reader that is further behind gets OUT_OF_RANGE.
// Cursors: "<generation> <position>" in the log, "<generation> <position> <key>" while the live chunks are still being
// listed; the generation is another one in every process.
class ChangeLog {
 public:
  explicit ChangeLog(size_t capacity);
  void Append(const ChunkInfo& info) ABSL_LOCKS_EXCLUDED(mu_);
  // Unknown chunks are skipped.
  void Evict(const ChunkKey& key) ABSL_LOCKS_EXCLUDED(mu_);
  // As Store::Changes.
  absl::StatusOr<ChangeBatch> Read(const std::string& cursor, int max, absl::Duration wait) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Position {
    int64_t next = 0;                  // in the log
    std::optional<ChunkKey> listed;    // live chunks are listed up to this one, exclusive of it
  };
  absl::StatusOr<Position> ParseCursor(const std::string& cursor) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t end() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return first_ + static_cast<int64_t>(log_.size()); }
  void Add(Change::Kind kind, const ChunkInfo& info) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const size_t capacity_;
  const std::string generation_;
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::map<ChunkKey, ChunkInfo> live_ ABSL_GUARDED_BY(mu_);
  std::deque<Change> log_ ABSL_GUARDED_BY(mu_);
  int64_t first_ ABSL_GUARDED_BY(mu_) = 0;  // position of log_.front()
};

}  // namespace orrery
