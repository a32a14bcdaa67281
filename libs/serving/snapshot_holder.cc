#include "libs/serving/snapshot_holder.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/status.h"

namespace orrery {
namespace {

std::string Text(const SnapshotVersion& version) { return absl::StrCat(version.generation, ".", version.counter); }

}  // namespace

SnapshotHolder::SnapshotHolder(Options options)
    : options_(std::move(options)),
      version_gauge_(AddGauge(*options_.registry, "planner_snapshot_version", "Updates of the snapshot that is served.",
                              options_.labels)),
      timestamp_(AddGauge(*options_.registry, "planner_snapshot_timestamp_seconds",
                          "Unix time when the snapshot that is served was taken into use.", options_.labels)),
      held_gauge_(AddGauge(*options_.registry, "planner_snapshot_held",
                           "1 while a rollback holds the snapshot that is served, else 0.", options_.labels)),
      refused_(AddCounter(*options_.registry, "planner_snapshots_refused_total",
                          "Snapshots that were damaged or did not fit.", options_.labels)) {}

absl::StatusOr<std::shared_ptr<const ServedModel>> SnapshotHolder::Build(absl::string_view file,
                                                                         std::optional<SnapshotVersion> version) {
  return CatchExceptions("snapshot", [&]() -> absl::StatusOr<std::shared_ptr<const ServedModel>> {
    ASSIGN_OR_RETURN(ModelSnapshot parsed, ParseSnapshot(file));
    parsed.model->to(options_.device);
    parsed.model->UseWorkers(options_.workers);
    if (options_.bfloat16) parsed.model->UseBfloat16();
    auto served = std::make_shared<ServedModel>();
    served->info = std::move(parsed.info);
    if (options_.planner.has_value()) served->info.planner = *options_.planner;
    served->name = !options_.name.empty() ? options_.name : served->info.run;
    if (served->name.empty()) served->name = options_.default_name;
    served->version = version.value_or(SnapshotVersion{served->info.generation, served->info.counter});
    served->structure_hash = parsed.model->StructureHash();
    ASSIGN_OR_RETURN(served->planner, MakePlanner(served->info.planner, parsed.model->config()));
    served->model = std::move(parsed.model);
    served->workers = options_.workers;
    return std::shared_ptr<const ServedModel>(std::move(served));
  });
}

absl::Status SnapshotHolder::Load(absl::string_view file, std::optional<SnapshotVersion> version) {
  absl::MutexLock load_lock(&load_mu_);
  const std::shared_ptr<const ServedModel> old = Newest();
  absl::StatusOr<std::shared_ptr<const ServedModel>> built = Build(file, version);
  if (built.ok() && old != nullptr && (*built)->version <= old->version) {
    return absl::AlreadyExistsError(
        absl::StrCat("snapshot ", Text((*built)->version), " is not newer than ", Text(old->version), ", the newest here"));
  }
  absl::Status status = built.status();
  const bool same_structure = status.ok() && old != nullptr && old->structure_hash == (*built)->structure_hash;
  if (status.ok() && options_.warm_up && (options_.warm_up_each || !same_structure)) {
    status = Annotate(options_.warm_up(**built), "warming up");
  }
  if (!status.ok()) {
    Refuse(status, version);
    return status;
  }
  Swap(*built);
  LogDebug("snapshot loaded model={} version={} serving={}", (*built)->name, Text((*built)->version), Text(this->version()));
  if (options_.on_swap) options_.on_swap(**built);
  return absl::OkStatus();
}

void SnapshotHolder::Refuse(const absl::Status& error, std::optional<SnapshotVersion> version) {
  refused_.Increment();
  const std::optional<SnapshotVersion> served = state().served;
  LogWarning("snapshot refused version={} serving={} error=\"{}\"", version.has_value() ? Text(*version) : "unknown",
             served.has_value() ? Text(*served) : "nothing", error.ToString());
}

std::shared_ptr<const ServedModel> SnapshotHolder::Get() const {
  absl::MutexLock lock(&mu_);
  return kept_.empty() ? nullptr : kept_[served_].served;
}

std::shared_ptr<const ServedModel> SnapshotHolder::Newest() const {
  absl::MutexLock lock(&mu_);
  return kept_.empty() ? nullptr : kept_.back().served;
}

std::shared_ptr<const ServedModel> SnapshotHolder::Get(const SnapshotVersion& version) {
  absl::MutexLock lock(&mu_);
  if (kept_.empty()) return nullptr;
  const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Kept& kept) { return kept.served->version == version; });
  if (found == kept_.end()) return kept_[served_].served;
  found->asked = options_.clock->Now();
  return found->served;
}

void SnapshotHolder::Swap(std::shared_ptr<const ServedModel> served) {
  absl::MutexLock lock(&mu_);
  ForgetLocked();
  kept_.push_back({std::move(served)});
  if (!held_) ServeLocked(kept_.size() - 1, /*held=*/false);
}

void SnapshotHolder::ForgetLocked() {
  // The last one becomes the one before the newest.
  const auto stays = [this](size_t i) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return i + 1 == kept_.size() || (held_ && (i == served_ || i + 1 == served_));
  };
  const auto forget = [this](size_t i) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
    if (i < served_) served_ -= 1;
  };
  const absl::Time oldest = options_.clock->Now() - kKeep;
  for (size_t i = 0; i < kept_.size();) {
    if (stays(i) || kept_[i].asked >= oldest) {
      ++i;
    } else {
      forget(i);
    }
  }
  for (size_t i = 0; i < kept_.size() && kept_.size() >= kMostKept;) {
    if (stays(i)) {
      ++i;
    } else {
      forget(i);
    }
  }
}

void SnapshotHolder::ServeLocked(size_t index, bool held) {
  served_ = index;
  held_ = held;
  version_gauge_.Set(static_cast<double>(kept_[index].served->version.counter));
  timestamp_.Set(absl::ToDoubleSeconds(options_.clock->Now() - absl::UnixEpoch()));
  held_gauge_.Set(held ? 1 : 0);
}

absl::StatusOr<SnapshotVersion> SnapshotHolder::Rollback(std::optional<SnapshotVersion> expected) {
  absl::MutexLock lock(&mu_);
  if (kept_.empty()) return absl::UnavailableError("no snapshot yet: there is nothing to go back from");
  const SnapshotVersion left = kept_[served_].served->version;
  if (expected.has_value() && *expected != left) {
    return absl::AbortedError(absl::StrCat("snapshot ", Text(left), " is served, expected ", Text(*expected)));
  }
  if (served_ == 0) {
    return absl::FailedPreconditionError(absl::StrCat("no snapshot before ", Text(left), " is kept"));
  }
  ServeLocked(served_ - 1, /*held=*/true);
  LogWarning("snapshot rolled back model={} from={} to={}, held until it is resumed", kept_[served_].served->name, Text(left),
             Text(kept_[served_].served->version));
  return left;
}

absl::Status SnapshotHolder::Resume() {
  absl::MutexLock lock(&mu_);
  if (kept_.empty()) return absl::UnavailableError("no snapshot yet: there is nothing to resume");
  if (!held_) return absl::OkStatus();
  const SnapshotVersion left = kept_[served_].served->version;
  ServeLocked(kept_.size() - 1, /*held=*/false);
  LogInfo("snapshots resumed model={} from={} to={}", kept_[served_].served->name, Text(left),
          Text(kept_[served_].served->version));
  return absl::OkStatus();
}

SnapshotHolder::State SnapshotHolder::state() const {
  absl::MutexLock lock(&mu_);
  if (kept_.empty()) return {};
  State state;
  state.served = kept_[served_].served->version;
  state.newest = kept_.back().served->version;
  if (served_ > 0) state.previous = kept_[served_ - 1].served->version;
  state.held = held_;
  return state;
}

}  // namespace orrery
