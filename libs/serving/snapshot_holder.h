// Holds the snapshot that is served and swaps newer ones in.
#pragma once

#include <prometheus/registry.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/clock.h"
#include "libs/config/config.h"
#include "libs/serving/served_model.h"
#include "libs/telemetry/metrics.h"

namespace orrery {

// A new snapshot is parsed, checked and warmed up beside the one in use; only then the pointer changes, between two
// batches. Whatever is wrong with it, the old one goes on being served. Rollback returns to the one before and holds it: what
// comes meanwhile is loaded, but not served until Resume. Thread-safe.
class SnapshotHolder {
 public:
  struct Options {
    std::optional<config::v1::Planner> planner;  // instead of the snapshot's own
    std::string name;                            // of the model; empty: its run's, as the snapshot says
    std::string default_name;                    // name of a model whose snapshot does not say its run
    prometheus::Labels labels;                   // of every metric
    torch::Device device = torch::kCPU;
    std::shared_ptr<RowWorkers> workers = std::make_shared<RowWorkers>(1);  // share what is computed on the CPU; required
    bool bfloat16 = false;                // rollouts on the CPU
    std::shared_ptr<prometheus::Registry> registry;  // required
    Clock* clock = &Clock::Real();                   // must outlive this
    // Tries a model of a structure that was not served before; an error refuses the snapshot. Empty: no trial.
    std::function<absl::Status(const ServedModel&)> warm_up;
    bool warm_up_each = false;  // also those of the structure served before
    // Called after every snapshot that was loaded, on the thread that called Load. Empty: nobody cares.
    std::function<void(const ServedModel&)> on_swap;
  };
  explicit SnapshotHolder(Options options);

  // Versions; unset: there is none.
  struct State {
    std::optional<SnapshotVersion> served;
    std::optional<SnapshotVersion> newest;    // loaded; after Rollback not the one served
    std::optional<SnapshotVersion> previous;  // to which Rollback would return
    bool held = false;                        // since Rollback
  };

  // Serves the snapshot in `file` (a safetensors file) from now on; after Rollback, from Resume on. `version` is what its
  // sender said; unset: what the file says. ALREADY_EXISTS: not newer than the newest (nothing is wrong). Another error:
  // refused, counted, logged.
  absl::Status Load(absl::string_view file, std::optional<SnapshotVersion> version = std::nullopt)
      ABSL_LOCKS_EXCLUDED(load_mu_, mu_);
  // Counts and logs a snapshot that was damaged on its way here, as Load does with what it refuses. `version` is what its
  // sender said; unset: unknown.
  void Refuse(const absl::Status& error, std::optional<SnapshotVersion> version) ABSL_LOCKS_EXCLUDED(mu_);
  // Serves the snapshot before the one served, at once, and holds it. `expected`, where set, must be served now. Returns what
  // was served before. UNAVAILABLE: nothing is served yet. ABORTED: another than `expected` is. FAILED_PRECONDITION: no earlier
  // one is kept.
  absl::StatusOr<SnapshotVersion> Rollback(std::optional<SnapshotVersion> expected = std::nullopt) ABSL_LOCKS_EXCLUDED(mu_);
  // Ends the hold: the newest is served, and each that comes. Nothing held: no change. UNAVAILABLE: nothing is served yet.
  absl::Status Resume() ABSL_LOCKS_EXCLUDED(mu_);
  State state() const ABSL_LOCKS_EXCLUDED(mu_);

  // What is served now; nullptr: nothing yet.
  std::shared_ptr<const ServedModel> Get() const ABSL_LOCKS_EXCLUDED(mu_);
  // The snapshot of that version while it is kept, else what is served now. Kept are the newest two, a held one with the one
  // before it, and those asked for here within kKeep, kMostKept in all.
  std::shared_ptr<const ServedModel> Get(const SnapshotVersion& version) ABSL_LOCKS_EXCLUDED(mu_);
  // Version served now; {0, 0}: none.
  SnapshotVersion version() const { return state().served.value_or(SnapshotVersion{}); }

  static constexpr absl::Duration kKeep = absl::Minutes(1);
  static constexpr size_t kMostKept = 8;

 private:
  struct Kept {
    std::shared_ptr<const ServedModel> served;
    absl::Time asked = absl::InfinitePast();
  };

  // Keeps a new snapshot, takes it into use unless one is held, and forgets what need not be kept.
  void Swap(std::shared_ptr<const ServedModel> served) ABSL_LOCKS_EXCLUDED(mu_);
  std::shared_ptr<const ServedModel> Newest() const ABSL_LOCKS_EXCLUDED(mu_);
  void ForgetLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ServeLocked(size_t index, bool held) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<std::shared_ptr<const ServedModel>> Build(absl::string_view file, std::optional<SnapshotVersion> version);

  // Constant after construction.
  const Options options_;
  prometheus::Gauge& version_gauge_;
  prometheus::Gauge& timestamp_;
  prometheus::Gauge& held_gauge_;
  prometheus::Counter& refused_;

  absl::Mutex load_mu_ ABSL_ACQUIRED_BEFORE(mu_);  // one Load at a time
  mutable absl::Mutex mu_;
  std::vector<Kept> kept_ ABSL_GUARDED_BY(mu_);  // from old to new
  size_t served_ ABSL_GUARDED_BY(mu_) = 0;       // of kept_, which is served; while nothing is held, the last one
  bool held_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace orrery
