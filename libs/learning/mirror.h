// The learner's copy of the data set: every chunk crosses the network once and is sampled from here.
#pragma once

#include <prometheus/counter.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/base/array.h"
#include "libs/base/clock.h"
#include "libs/client/replay_client.h"
#include "libs/config/config.h"
#include "libs/device/side_copy.h"
#include "libs/learning/batch_source.h"
#include "libs/replay/episode_index.h"

namespace orrery {

// Decoded training rows in host memory, fed by a ChunkWatcher on a thread of its own. Thread-safe.
//
// A chunk that cannot be decoded or does not fit the model is counted, logged and skipped: it never stops the learner.
// Data beyond `max_bytes` does: from then on every call returns RESOURCE_EXHAUSTED, for a mirror that silently forgot rows
// would no longer be the data set.
class Mirror {
 public:
  struct Options {
    config::v1::Model model;                    // complete
    int sequence_length = 50;
    int64_t max_rows = 1000000;                 // what replay keeps
    int64_t max_bytes = int64_t{8} << 30;       // of decoded rows
    Clock* clock = &Clock::Real();              // must outlive the mirror
    prometheus::Counter* refused_chunks = nullptr;  // null: not counted
  };
  // Where one field of a row lies.
  struct Field {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;  // of one row
    int64_t row_bytes;
  };

  // RESOURCE_EXHAUSTED when max_rows rows of the model's sizes would not fit in max_bytes.
  static absl::StatusOr<std::unique_ptr<Mirror>> Create(const Options& options);
  ~Mirror();
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  // Starts the thread that applies the watcher's events. Call once.
  void Follow(std::unique_ptr<ChunkWatcher> watcher);
  // Closes the watcher, ends the thread and wakes every waiter with CANCELLED.
  void Stop();
  // What the thread does with one event. A refused chunk: FAILED_PRECONDITION or DATA_LOSS, the mirror goes on.
  absl::Status Apply(ChunkWatcher::Event event);

  // Waits until `rows` training rows have been seen. Rows that were evicted before the watch began cannot be seen: when
  // nothing has arrived for `patience` since they are waited for and the watch has caught up, the missing ones count as
  // evicted (one log line).
  // DEADLINE_EXCEEDED: not yet.
  absl::Status WaitForRows(int64_t rows, absl::Duration patience, absl::Time deadline);
  // Draws `count` sequences and gives every row of them to `copy_row(field index, sequence, step, bytes)`. Waits for a
  // valid start. DEADLINE_EXCEEDED: none until then.
  template <typename CopyRow>
  absl::Status Sample(int count, std::mt19937_64& random, absl::Time deadline, const CopyRow& copy_row);

  const std::vector<Field>& fields() const { return fields_; }
  int sequence_length() const { return options_.sequence_length; }
  int64_t row_bytes() const { return row_bytes_; }
  IndexTotals totals() const;

 private:
  using Rows = std::vector<Array>;  // one array per field, in the order of fields_

  explicit Mirror(const Options& options);
  void Feed();
  absl::StatusOr<Rows> DecodeChunk(const Chunk& chunk) const;
  absl::Status Insert(const ChunkInfo& info, Rows rows) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Waits for a valid start.
  absl::Status AwaitStart(absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Constant after construction.
  const Options options_;
  std::vector<Field> fields_;
  int64_t row_bytes_ = 0;

  mutable absl::Mutex mu_;
  absl::CondVar changed_;
  std::map<ChunkKey, Rows> chunks_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<EpisodeIndex> index_ ABSL_GUARDED_BY(mu_);
  int64_t rows_seen_ ABSL_GUARDED_BY(mu_) = 0;     // since the watch began anew
  int64_t rows_evicted_ ABSL_GUARDED_BY(mu_) = 0;  // taken as evicted before it began
  bool caught_up_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time last_change_ ABSL_GUARDED_BY(mu_);
  int64_t awaited_rows_ ABSL_GUARDED_BY(mu_) = -1;  // of WaitForRows, since awaited_since_
  absl::Time awaited_since_ ABSL_GUARDED_BY(mu_);
  absl::Status failure_ ABSL_GUARDED_BY(mu_);  // OK while the mirror works

  std::unique_ptr<ChunkWatcher> watcher_;
  std::thread feeder_;  // last: it uses everything above
};

// Which part of a batch is gathered: batch_size / ranks sequences from number rank · batch_size / ranks on.
struct BatchPart {
  int rank = 0;
  int ranks = 1;
};

// Batches gathered from a mirror, uniformly over all valid starts. One consumer thread. The memory of a batch is used again
// once the caller has dropped it, which must not be before the device has read it.
//
// With several ranks each draws the sequences of the whole batch and gathers its part: those with the same seed, from mirrors of
// the same rows, have together what one source would have given.
class MirroredSource : public BatchSource {
 public:
  // The mirror must outlive the source. `batch_size`: of the whole batch, a multiple of the ranks. Batches lie on `device`; on
  // a GPU they are there when they are given, copied beside its work (side_copy.h).
  MirroredSource(Mirror* mirror, int batch_size, uint64_t seed, torch::Device device = torch::kCPU, BatchPart part = {0, 1});
  ~MirroredSource() override;
  absl::StatusOr<StoredBatch> Next(absl::Time deadline) override;
  // Begins to gather the next batch meanwhile, on a thread of its own, from the rows that are there now, and to copy it to the
  // device.
  void Prefetch();

  // State of the sampler after the last batch of Next, for checkpoints: a batch that was only prefetched comes again.
  std::string State() const;
  // INVALID_ARGUMENT: not such a state. What was prefetched is dropped.
  absl::Status SetState(const std::string& state);

 private:
  using Buffers = std::map<std::string, torch::Tensor>;

  // A batch by way of `buffers`.
  absl::StatusOr<StoredBatch> Gather(std::mt19937_64& random, Buffers& buffers, absl::Time deadline);
  absl::Status Fill(std::mt19937_64& random, Buffers& buffers, absl::Time deadline);
  StoredBatch OnDevice(const Buffers& buffers);
  void Work();  // the thread's
  // Waits until nothing is being gathered, and takes what was.
  std::optional<StoredBatch> TakePrefetched();

  // Constant after construction.
  Mirror* const mirror_;
  const int whole_batch_;  // sequences that are drawn
  const int batch_size_;   // and gathered, from this one on:
  const int first_;
  const bool pinned_;  // a GPU copies from such memory without the processor

  // The consumer's; while `wanted_`, those that are `ahead` and the copies are the thread's.
  std::mt19937_64 random_, random_ahead_;
  Buffers buffers_, buffers_ahead_;  // on the host
  SideCopy to_device_;

  absl::Mutex mu_;
  absl::CondVar changed_;
  bool wanted_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<StoredBatch> prefetched_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;  // last: it uses everything above
};

template <typename CopyRow>
absl::Status Mirror::Sample(int count, std::mt19937_64& random, absl::Time deadline, const CopyRow& copy_row) {
  absl::MutexLock lock(&mu_);
  if (absl::Status status = AwaitStart(deadline); !status.ok()) return status;
  for (int sequence = 0; sequence < count; ++sequence) {
    const std::optional<Sequence> drawn = index_->Sample(random);
    if (!drawn.has_value()) return absl::InternalError("the episode index has valid starts but drew none");
    int step = 0;
    for (const ChunkSlice& slice : drawn->slices) {
      const auto chunk = chunks_.find(slice.key);
      if (chunk == chunks_.end()) return absl::InternalError("the episode index names a chunk that is not there");
      for (size_t i = 0; i < fields_.size(); ++i) {
        const int64_t row_bytes = fields_[i].row_bytes;
        const char* rows = chunk->second[i].bytes.data() + slice.begin * row_bytes;
        for (int row = 0; row < slice.rows; ++row) copy_row(i, sequence, step + row, rows + row * row_bytes);
      }
      step += slice.rows;
    }
  }
  return absl::OkStatus();
}

}  // namespace orrery
