// What `orrery train` writes while it runs: metrics.csv, TensorBoard events, episodes.csv; and the totals it shows.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/learning/learner.h"
#include "libs/learning/training_log.h"
#include "services/actor/actor.h"

namespace orrery {

// Totals over the whole run, earlier sessions included.
struct RunTotals {
  int64_t episodes = 0;           // collected for training
  int64_t environment_steps = 0;  // of those, action repeat counted
  double seconds = 0;             // of training, up to the last episode
  std::optional<double> last_return, best_return, evaluation_return;  // of training episodes; of the last evaluation one
};

// Thread-safe. A file that cannot be written any more (a full disk) is reported once; training goes on.
class RunLog {
 public:
  // In a folder that holds an earlier run's files, goes on behind update `updates`; episodes.csv keeps its rows.
  static absl::StatusOr<std::unique_ptr<RunLog>> Open(const std::string& folder, int64_t updates,
                                                      double steps_per_row);
  ~RunLog();
  void AddUpdate(const Learner::UpdateReport& report);
  // `updates`: made when the episode ended.
  void AddEpisode(const EpisodeSummary& episode, int64_t updates);
  RunTotals totals() const;

 private:
  explicit RunLog(double steps_per_row) : steps_per_row_(steps_per_row), begin_(absl::Now()) {}
  absl::Status OpenEpisodes(const std::string& path) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Count(const std::string& mode, double episode_return, int64_t steps, double seconds)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Note(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const double steps_per_row_;
  const absl::Time begin_;
  double seconds_before_ = 0;  // constant after Open
  mutable absl::Mutex mu_;
  RunTotals totals_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<CsvLog> metrics_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<EventLog> events_ ABSL_GUARDED_BY(mu_);
  std::FILE* episodes_ ABSL_GUARDED_BY(mu_) = nullptr;
  bool failed_ ABSL_GUARDED_BY(mu_) = false;
};

// What the progress line shows.
struct ProgressView {
  RunTotals totals;
  std::optional<int64_t> max_episodes;
  int64_t updates = 0;
  double updates_per_second = 0;
  std::optional<double> loss;
  std::optional<double> seconds_left;
};
// "episode 12/40  steps 12000  updates 700 (13.2/s)  return 210.1 (best 240.3)  eval 300.0  loss 12.30  left 3:12".
std::string FormatProgress(const ProgressView& view);

}  // namespace orrery
