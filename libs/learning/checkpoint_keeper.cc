#include "libs/learning/checkpoint_keeper.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/config/config.h"

namespace orrery {

absl::StatusOr<CheckpointKeeper> CheckpointKeeper::Open(Options options) {
  CheckpointKeeper keeper(std::move(options));
  if (keeper.options_.folder.empty()) return keeper;
  ASSIGN_OR_RETURN(keeper.checkpoints_, CheckpointFolder::Open(keeper.options_.folder, keeper.options_.keep));
  return keeper;
}

absl::StatusOr<std::optional<Checkpoint>> CheckpointKeeper::ToResume(const std::string& run, bool resume) {
  if (!checkpoints_.has_value()) return std::nullopt;
  const std::string& folder = options_.folder;
  if (!resume) {
    ASSIGN_OR_RETURN(const bool empty, checkpoints_->empty());
    if (empty) return std::nullopt;
    return absl::FailedPreconditionError(absl::StrCat(folder, " holds checkpoints: resume from them, or give another folder"));
  }
  absl::StatusOr<Checkpoint> checkpoint = checkpoints_->LoadNewest();
  if (absl::IsNotFound(checkpoint.status())) {
    LogInfo("no checkpoint to resume from, learning begins folder={}", folder);
    return std::nullopt;
  }
  RETURN_IF_ERROR(checkpoint.status());
  ASSIGN_OR_RETURN(const config::v1::Experiment saved, ParseExperiment(checkpoint->experiment));
  if (saved.name() != run) {
    return absl::FailedPreconditionError(
        absl::StrCat("the checkpoints in ", folder, " are of the run \"", saved.name(), "\", not \"", run, "\""));
  }
  saved_updates_ = checkpoint->updates;
  return std::optional<Checkpoint>(*std::move(checkpoint));
}

bool CheckpointKeeper::Count(bool skipped) {
  learnt_ = learnt_ || !skipped;
  skipped_in_a_row_ = skipped ? skipped_in_a_row_ + 1 : 0;
  if (skipped_in_a_row_ < kSkippedBeforeReturn) return false;
  skipped_in_a_row_ = 0;
  return true;
}

void CheckpointKeeper::Save(int64_t updates, absl::FunctionRef<Checkpoint()> state) {
  if (!checkpoints_.has_value() || saved_updates_ == updates) return;
  if (returns_ > 0 && !learnt_) return;  // what it went back to is there
  const absl::Status status = checkpoints_->Save(state());
  if (!status.ok()) {
    if (options_.errors != nullptr) options_.errors->Increment();
    LogError("checkpoint not written, training goes on updates={} reason={}", updates, status.ToString());
    return;
  }
  saved_updates_ = updates;
  if (learnt_) returns_ = 0;
}

absl::StatusOr<Checkpoint> CheckpointKeeper::ToGoBackTo(int64_t updates) {
  const std::string what = absl::StrCat(kSkippedBeforeReturn, " updates in a row were not finite (updates ", updates, ")");
  if (!checkpoints_.has_value()) return absl::InternalError(absl::StrCat(what, " and there are no checkpoints"));
  if (++returns_ > kReturnsBeforeGivingUp) {
    return absl::InternalError(absl::StrCat(what, " again after ", kReturnsBeforeGivingUp,
                                            " returns to the last checkpoint: lower learning.learning_rate"));
  }
  absl::StatusOr<Checkpoint> checkpoint = absl::NotFoundError("");
  if (returns_ > 1 && !learnt_) checkpoint = checkpoints_->LoadNewest(/*before=*/returned_to_);
  if (!checkpoint.ok()) checkpoint = checkpoints_->LoadNewest();
  if (!checkpoint.ok()) return absl::InternalError(absl::StrCat(what, ": ", checkpoint.status().message()));
  learnt_ = false;
  returned_to_ = checkpoint->updates;
  LogError("{}: going back to the parameters of the checkpoint updates={}", what, checkpoint->updates);
  return checkpoint;
}

}  // namespace orrery
