// Puts requests of many clients together into batches for one engine.
#pragma once

#include <prometheus/registry.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/base/clock.h"
#include "libs/telemetry/metrics.h"

namespace orrery {

// One request that waits. The batcher owns it until it is in a batch or has failed; Fail is called at most once, never
// under the batcher's lock.
class BatchRequest {
 public:
  virtual ~BatchRequest() = default;
  // The caller has gone; called from any thread.
  virtual bool cancelled() const = 0;
  // The request will not be computed. RESOURCE_EXHAUSTED: the queue is full, on arrival or later of more urgent ones.
  // DEADLINE_EXCEEDED, CANCELLED: dropped before compute. UNAVAILABLE: the batcher was closed.
  virtual void Fail(const absl::Status& status) = 0;
  // OK while somebody waits for the answer at `now`, else what to fail with before it is computed: CANCELLED or
  // DEADLINE_EXCEEDED.
  absl::Status CheckWanted(absl::Time now) const;

  // Set before Enqueue.
  std::string client_id;
  int64_t slots = 1;    // at least 1
  bool urgent = false;  // before all that are not
  absl::Time deadline = absl::InfiniteFuture();

 private:
  friend class Batcher;
  absl::Time arrived_;
};

// A queue with one consumer. A batch is due when it is full (max_batch slots), when every client seen in the last second is
// waiting, or when the oldest request has waited max_delay for company; waiting for a busy engine does not count, so a
// batch grows while the engine works and clients that answer fast fall into step. A request is never split; one with more
// slots than max_batch runs alone. Urgent requests go first, else first come, first served; in a full queue an urgent one takes
// the places of the last that are not.
//
// With max_queue equal to max_batch, the default of the service, what waits fits into the next batch: an answer then takes at
// most max_delay and the computing of two batches, whatever the load. A longer queue only makes the wait longer: the engine has
// a full batch either way.
//
// Thread-safe; Step is called by one thread.
class Batcher {
 public:
  using Batch = std::vector<std::unique_ptr<BatchRequest>>;
  struct Options {
    int64_t max_batch = 16;  // slots
    absl::Duration max_delay = absl::Milliseconds(5);
    int64_t max_queue = 16;                          // slots that may wait
    std::shared_ptr<prometheus::Registry> registry;  // required
    Clock* clock = &Clock::Real();                   // must outlive this
  };
  // `run` computes a batch on the thread that calls Step; it must finish every request and not throw.
  Batcher(Options options, std::function<void(Batch)> run);
  ~Batcher();

  // Queues the request, or fails it at once. An empty queue takes a request of any size.
  void Enqueue(std::unique_ptr<BatchRequest> request) ABSL_LOCKS_EXCLUDED(mu_);
  // Waits until a batch is due and runs it: `while (batcher.Step()) {}` is the worker. False: closed.
  bool Step() ABSL_LOCKS_EXCLUDED(mu_);
  // Step without waiting: false when no batch is due now.
  bool TryStep() ABSL_LOCKS_EXCLUDED(mu_);
  // Fails everything that waits and all that come later. Does not wait for a running batch.
  void Close() ABSL_LOCKS_EXCLUDED(mu_);
  // Clients that wait or are waited for.
  size_t known_clients() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Client {
    absl::Time seen;      // last arrival or answer
    int64_t waiting = 0;  // requests in the queue
  };
  struct Dropped {
    std::unique_ptr<BatchRequest> request;
    absl::Status status;
  };

  void DropDeadLocked(absl::Time now, std::vector<Dropped>& dropped) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool FitsLocked(int64_t slots) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Drops the last requests that are not urgent until `slots` fit; none when that would not help.
  void DisplaceLocked(int64_t slots, std::vector<Dropped>& dropped) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status FullLocked(int64_t slots) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Notes that `seen` is when the client was last seen, and that `more` of its requests wait (negative: fewer).
  void NoteClientLocked(const std::string& id, absl::Time seen, int64_t more) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Those not seen for kClientMemory that wait for nothing: their ids are what clients like, and may be new ones each time.
  void ForgetClientsLocked(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // When the batch is due if nothing else happens. Forgets clients first.
  absl::Time DueLocked(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Time NextDeadlineLocked() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Batch TakeLocked(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ForgetLocked(const BatchRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Run(Batch batch) ABSL_LOCKS_EXCLUDED(mu_);
  static void FailAll(std::vector<Dropped>& dropped);

  // Constant after construction.
  const Options options_;
  const std::function<void(Batch)> run_;
  prometheus::Gauge& depth_;
  prometheus::Histogram& queue_seconds_;
  prometheus::Histogram& batch_size_;

  mutable absl::Mutex mu_;
  absl::CondVar changed_;
  std::deque<std::unique_ptr<BatchRequest>> urgent_ ABSL_GUARDED_BY(mu_);
  std::deque<std::unique_ptr<BatchRequest>> usual_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, Client> clients_ ABSL_GUARDED_BY(mu_);
  std::set<std::pair<absl::Time, std::string>> idle_clients_ ABSL_GUARDED_BY(mu_);  // those that wait for nothing, by `seen`
  int64_t slots_waiting_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time idle_since_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();  // when the engine last became free
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace orrery
