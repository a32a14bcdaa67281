// Finds the stored chunks that sequences are cut from.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "libs/replay/episode_index.h"
#include "libs/replay/sequence_batch.h"
#include "libs/replay/store.h"

namespace orrery {

// Reads chunks and keeps the most recently used ones as they are stored, encoded: many times more rows than decoded, and no
// request to the store for them. Bounded in bytes. Thread-safe.
class SequenceReader {
 public:
  // `store` must outlive this.
  explicit SequenceReader(Store* store, int64_t cache_bytes = int64_t{256} << 20)
      : store_(store), cache_bytes_(cache_bytes) {}

  // The sequences in the order given. `epoch` (DataSet::clears) never falls; when it rises, what is cached is forgotten, for keys
  // may then stand for other rows. NOT_FOUND: a chunk was evicted meanwhile; draw again. INVALID_ARGUMENT: the batch, or
  // the payloads of its chunks, would be above SequenceBatch::kMaxBytes. DATA_LOSS: a chunk is damaged or of other fields.
  absl::StatusOr<SequenceBatch> Open(const std::vector<Sequence>& sequences, int64_t epoch = 0);

  // What the cache counts for a chunk beside EncodedRows::memory_bytes.
  static constexpr int64_t kChunkOverheadBytes = 1024;

 private:
  using Rows = std::shared_ptr<const EncodedRows>;
  struct Cached {
    ChunkKey key;
    Rows rows;
    int64_t bytes = 0;
  };

  // Sets the rows of every chunk, in the order given: cached ones, and the others from the store, some at a time.
  absl::Status Fill(std::vector<SequenceBatch::Source>& chunks, int64_t epoch);
  // Those of the chunks with these numbers from the store.
  absl::Status Load(absl::Span<const size_t> numbers, std::vector<SequenceBatch::Source>& chunks, int64_t epoch);
  Rows Find(const ChunkKey& key);
  void Forget(int64_t epoch);
  void Insert(const ChunkKey& key, Rows rows, int64_t epoch);

  Store* const store_;
  const int64_t cache_bytes_;
  absl::Mutex mu_;
  std::list<Cached> recent_ ABSL_GUARDED_BY(mu_);  // most recently used first
  std::map<ChunkKey, std::list<Cached>::iterator> by_key_ ABSL_GUARDED_BY(mu_);
  int64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t epoch_ ABSL_GUARDED_BY(mu_) = 0;  // of all that is cached
};

}  // namespace orrery
