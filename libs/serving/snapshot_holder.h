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
// batches. Whatever is wrong with it, the old one goes on being served. Thread-safe.
class SnapshotHolder {
 public:
  struct Options {
    std::optional<config::v1::Planner> planner;  // instead of the snapshot's own
    std::string default_name;                    // name of a model whose snapshot does not say its run
    torch::Device device = torch::kCPU;
    std::shared_ptr<RowWorkers> workers;  // share rollouts on the CPU; null: none
    bool bfloat16 = false;                // rollouts on the CPU
    std::shared_ptr<prometheus::Registry> registry;  // required
    Clock* clock = &Clock::Real();                   // must outlive this
    // Tries a model of a structure that was not served before; an error refuses the snapshot. Empty: no trial.
    std::function<absl::Status(const ServedModel&)> warm_up;
    // Called after every swap, on the thread that called Load. Empty: nobody cares.
    std::function<void(const ServedModel&)> on_swap;
  };
  explicit SnapshotHolder(Options options);

  // Serves the snapshot in `file` (a safetensors file) from now on. `version` is what its sender said; unset: what the
  // file says. ALREADY_EXISTS: not newer than the one served (nothing is wrong). Another error: refused, counted, logged.
  absl::Status Load(absl::string_view file, std::optional<SnapshotVersion> version = std::nullopt)
      ABSL_LOCKS_EXCLUDED(load_mu_, mu_);
  // What is served now; nullptr: nothing yet.
  std::shared_ptr<const ServedModel> Get() const ABSL_LOCKS_EXCLUDED(mu_);
  // The snapshot of that version while it is kept, else what is served now. Kept are the newest two, and those asked for here
  // within kKeep, kMostKept in all.
  std::shared_ptr<const ServedModel> Get(const SnapshotVersion& version) ABSL_LOCKS_EXCLUDED(mu_);
  // Version served now; {0, 0}: none.
  SnapshotVersion version() const ABSL_LOCKS_EXCLUDED(mu_);

  static constexpr absl::Duration kKeep = absl::Minutes(1);
  static constexpr size_t kMostKept = 8;

 private:
  struct Kept {
    std::shared_ptr<const ServedModel> served;
    absl::Time asked = absl::InfinitePast();
  };

  // Takes a new snapshot into use and forgets what need not be kept.
  void Swap(std::shared_ptr<const ServedModel> served) ABSL_LOCKS_EXCLUDED(mu_);
  absl::StatusOr<std::shared_ptr<const ServedModel>> Build(absl::string_view file, std::optional<SnapshotVersion> version);

  // Constant after construction.
  const Options options_;
  prometheus::Gauge& version_gauge_;
  prometheus::Gauge& timestamp_;
  prometheus::Counter& refused_;

  absl::Mutex load_mu_ ABSL_ACQUIRED_BEFORE(mu_);  // one Load at a time
  mutable absl::Mutex mu_;
  std::vector<Kept> kept_ ABSL_GUARDED_BY(mu_);  // the last one is served
};

}  // namespace orrery
