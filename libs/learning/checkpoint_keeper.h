// When the learner writes checkpoints, and when it goes back to one.
#pragma once

#include <prometheus/counter.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "libs/learning/checkpoint.h"

namespace orrery {

// The checkpoints of one run, and the count of updates that were skipped because they were not finite. Not thread-safe.
//
// After kSkippedBeforeReturn such updates in a row the parameters are taken for spoilt, and learning goes back to the newest
// checkpoint; where nothing could be learnt from that one, which may hold spoilt parameters itself, to the one before it. Where
// no checkpoint with something learnt is written between such returns, the one after kReturnsBeforeGivingUp ends it. The ranks of
// a group skip alike, so each counts by itself; those without a folder never save.
class CheckpointKeeper {
 public:
  static constexpr int kSkippedBeforeReturn = 10;
  static constexpr int kReturnsBeforeGivingUp = 3;

  struct Options {
    std::string folder;                     // empty: no checkpoints
    int keep = 3;                           // at least 1
    int64_t every_updates = 1000;           // at least 1
    prometheus::Counter* errors = nullptr;  // of writing; must outlive the keeper; null: not counted
  };
  // The errors of CheckpointFolder::Open.
  static absl::StatusOr<CheckpointKeeper> Open(Options options);

  // The newest checkpoint, for learning to go on from. nullopt: there is none. FAILED_PRECONDITION: there are checkpoints and
  // `resume` is not set, or none of them can be used, or they are of another run than `run`. The error of ReadFile, too.
  absl::StatusOr<std::optional<Checkpoint>> ToResume(const std::string& run, bool resume);

  // Counts an update. True: learning has to go back now.
  bool Count(bool skipped);
  // Those up to now; 0 after a return.
  int skipped_in_a_row() const { return skipped_in_a_row_; }
  // Whether after `updates` a checkpoint is due: none is as long as updates are skipped.
  bool Due(int64_t updates) const { return updates % options_.every_updates == 0 && skipped_in_a_row_ == 0; }
  // Writes the state after `updates`, unless that is there or nothing was learnt since a return. An error is counted and logged: learning goes on.
  void Save(int64_t updates, absl::FunctionRef<Checkpoint()> state);
  // The checkpoint to go back to after `updates`. INTERNAL: there is none that is whole, or it is of no use any more.
  absl::StatusOr<Checkpoint> ToGoBackTo(int64_t updates);

 private:
  explicit CheckpointKeeper(Options options) : options_(std::move(options)) {}

  Options options_;  // constant after construction
  std::optional<CheckpointFolder> checkpoints_;
  int64_t saved_updates_ = -1;
  int skipped_in_a_row_ = 0;
  int returns_ = 0;          // since the last checkpoint with something learnt
  int64_t returned_to_ = 0;  // updates of the checkpoint of the last return
  bool learnt_ = false;      // an update that was not skipped was made since the last return
};

}  // namespace orrery
