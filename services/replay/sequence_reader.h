// Assembles batches of sequences from stored chunks.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/array.h"
#include "libs/replay/episode_index.h"
#include "libs/replay/store.h"

namespace orrery {

// Decodes chunks and keeps the most recently used ones, bounded in bytes. Thread-safe.
class SequenceReader {
 public:
  // `store` must outlive this.
  explicit SequenceReader(Store* store, int64_t cache_bytes = int64_t{256} << 20)
      : store_(store), cache_bytes_(cache_bytes) {}

  // Every field as [sequences, L, …], in the order given. NOT_FOUND: a chunk was evicted meanwhile; draw again.
  // INVALID_ARGUMENT: the batch would be above kMaxBatchBytes. DATA_LOSS: a chunk is damaged or of other fields.
  absl::StatusOr<ArrayMap> Read(const std::vector<Sequence>& sequences);

  static constexpr int64_t kMaxBatchBytes = int64_t{1} << 30;

 private:
  using Rows = std::shared_ptr<const ArrayMap>;
  struct Cached {
    ChunkKey key;
    Rows rows;
    int64_t bytes = 0;
  };

  // Decodes what is not cached, a limited number of bytes at a time.
  absl::Status Prefetch(const std::vector<Sequence>& sequences);
  absl::StatusOr<std::vector<Rows>> Load(absl::Span<const ChunkKey> keys);
  absl::StatusOr<Rows> Get(const ChunkKey& key);
  Rows Find(const ChunkKey& key);
  void Insert(const ChunkKey& key, Rows rows);

  Store* const store_;
  const int64_t cache_bytes_;
  absl::Mutex mu_;
  std::list<Cached> recent_ ABSL_GUARDED_BY(mu_);  // most recently used first
  std::map<ChunkKey, std::list<Cached>::iterator> by_key_ ABSL_GUARDED_BY(mu_);
  int64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace orrery
