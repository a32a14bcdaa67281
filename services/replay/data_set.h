// What is live in the store, as this process knows it: followed from the store's change log.
#pragma once

#include <prometheus/registry.h>

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/replay/episode_index.h"
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
  // `count` independent draws; none when there is no valid start.
  std::vector<Sequence> Sample(int sequence_length, int count, std::mt19937_64& random);

 private:
  void Run();
  // One read of the log; false when the store does not answer.
  bool Step(std::string& cursor);
  void Apply(const ChangeBatch& batch);
  void Clear() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
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
  std::map<ChunkKey, ChunkInfo> live_ ABSL_GUARDED_BY(mu_);
  struct LengthIndex {
    std::unique_ptr<EpisodeIndex> index;
    int64_t last_use = 0;
  };
  std::map<int, LengthIndex> indexes_ ABSL_GUARDED_BY(mu_);  // by length; the default one is always there
  int64_t uses_ ABSL_GUARDED_BY(mu_) = 0;
  bool caught_up_ ABSL_GUARDED_BY(mu_) = false;

  bool ready_ = false;  // of the thread
  std::thread thread_;
};

}  // namespace orrery
