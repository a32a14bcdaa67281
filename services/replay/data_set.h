// What is live in the store, as this process knows it: followed from the store's change log.
#pragma once

#include <prometheus/registry.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "libs/replay/chunk_priorities.h"
#include "libs/replay/episode_index.h"
#include "libs/replay/sampler.h"
#include "libs/replay/store.h"
#include "services/replay/bell.h"

namespace orrery {

// A thread reads the change log, keeps indexes for sampling, and evicts the oldest chunks beyond the limits. Thread-safe.
class DataSet {
 public:
  struct Limits {
    int64_t max_rows = 0;
    int64_t max_bytes = 0;
  };
  // `store` must outlive this.
  DataSet(Store* store, Limits limits, int sequence_length, prometheus::Registry& registry);
  ~DataSet();
  DataSet(const DataSet&) = delete;
  DataSet& operator=(const DataSet&) = delete;

  // Begins to follow; `on_ready` is called from the thread: true after catching up, false when the store is away. Call once.
  void Start(std::function<void(bool)> on_ready);
  // Stops the thread and wakes every waiter. May be repeated.
  void Stop();

  // Rings when changes were seen: those who follow the store read it again.
  Bell& changes() { return bell_; }

  bool caught_up() const;
  bool Contains(const ChunkKey& key) const;
  IndexTotals totals() const;
  // Times that everything was forgotten because the store fell back or lost its log: what was read before may be another run's.
  int64_t clears() const;
  // `count` independent draws; none when there is nothing to draw from.
  std::vector<Sequence> Sample(const Sampler& sampler, int sequence_length, int count, std::mt19937_64& random);
  // Sets priorities for samplers by priority, of every length: how many were for live chunks. They are forgotten with
  // everything else (clears), and every chunk has 1 again.
  int SetPriorities(absl::Span<const ChunkPriority> priorities);
  // The live chunks of at most `max` episodes of that mode (none given: of any) from number `first` on, by episode and row.
  // Sets `next` to the number of the episode after them, 0 when there is none.
  std::vector<std::vector<ChunkInfo>> Episodes(int64_t first, int max, std::optional<EpisodeMode> mode, int64_t& next) const;

  // One read of the log from `cursor`, which moves on; waits up to `wait` for news. False when the store does not answer. What
  // the thread does again and again: only for one that was not started.
  bool Step(std::string& cursor, absl::Duration wait);

 private:
  void Run();
  void Apply(const ChangeBatch& batch);
  void Clear() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The live chunks of the first episode from `at` on, which moves behind it.
  std::vector<ChunkInfo> TakeEpisode(std::map<ChunkKey, ChunkInfo>::const_iterator& at) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EvictOldest();
  void SetReady(bool ready);
  // The index for a length, made on first use; the least recently used one beyond a few is dropped.
  EpisodeIndex& IndexFor(int sequence_length) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Constant after construction and Start.
  Store* const store_;
  const Limits limits_;
  const int default_length_;
  prometheus::Gauge& steps_;
  prometheus::Gauge& episodes_;
  prometheus::Gauge& bytes_;
  std::function<void(bool)> on_ready_;

  Bell bell_;
  mutable absl::Mutex mu_;
  int64_t clears_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<ChunkKey, ChunkInfo> live_ ABSL_GUARDED_BY(mu_);
  struct LengthIndex {
    std::unique_ptr<EpisodeIndex> index;
    int64_t last_use = 0;
  };
  std::map<int, LengthIndex> indexes_ ABSL_GUARDED_BY(mu_);  // by length; the default one is always there
  int64_t uses_ ABSL_GUARDED_BY(mu_) = 0;
  bool caught_up_ ABSL_GUARDED_BY(mu_) = false;

  // Of the thread.
  bool ready_ = false;
  absl::Time next_progress_;  // when it says next how far it is
  std::thread thread_;
};

}  // namespace orrery
