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
      version_gauge_(AddGauge(*options_.registry, "planner_snapshot_version", "Updates of the snapshot that is served.")),
      timestamp_(AddGauge(*options_.registry, "planner_snapshot_timestamp_seconds",
                          "Unix time when the snapshot that is served was taken into use.")),
      refused_(AddCounter(*options_.registry, "planner_snapshots_refused_total",
                          "Snapshots that were damaged or did not fit.")) {}

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
    served->name = served->info.run.empty() ? options_.default_name : served->info.run;
    served->version = version.value_or(SnapshotVersion{served->info.generation, served->info.counter});
    served->structure_hash = parsed.model->StructureHash();
    ASSIGN_OR_RETURN(served->planner, MakePlanner(served->info.planner, parsed.model->config()));
    served->model = std::move(parsed.model);
    return std::shared_ptr<const ServedModel>(std::move(served));
  });
}

absl::Status SnapshotHolder::Load(absl::string_view file, std::optional<SnapshotVersion> version) {
  absl::MutexLock load_lock(&load_mu_);
  const std::shared_ptr<const ServedModel> old = Get();
  absl::StatusOr<std::shared_ptr<const ServedModel>> built = Build(file, version);
  if (built.ok() && old != nullptr && (*built)->version <= old->version) {
    return absl::AlreadyExistsError(absl::StrCat("snapshot ", Text((*built)->version), " is not newer than ",
                                                 Text(old->version), ", which is served"));
  }
  absl::Status status = built.status();
  if (status.ok() && options_.warm_up && (old == nullptr || old->structure_hash != (*built)->structure_hash)) {
    status = Annotate(options_.warm_up(**built), "warming up");
  }
  if (!status.ok()) {
    refused_.Increment();
    LogWarning("snapshot refused version={} serving={} error=\"{}\"", version.has_value() ? Text(*version) : "its own",
               old == nullptr ? "nothing" : Text(old->version), status.ToString());
    return status;
  }
  Swap(*built);
  version_gauge_.Set(static_cast<double>((*built)->version.counter));
  timestamp_.Set(absl::ToDoubleSeconds(options_.clock->Now() - absl::UnixEpoch()));
  LogDebug("snapshot served model={} version={}", (*built)->name, Text((*built)->version));
  if (options_.on_swap) options_.on_swap(**built);
  return absl::OkStatus();
}

std::shared_ptr<const ServedModel> SnapshotHolder::Get() const {
  absl::MutexLock lock(&mu_);
  return kept_.empty() ? nullptr : kept_.back().served;
}

std::shared_ptr<const ServedModel> SnapshotHolder::Get(const SnapshotVersion& version) {
  absl::MutexLock lock(&mu_);
  if (kept_.empty()) return nullptr;
  const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Kept& kept) { return kept.served->version == version; });
  if (found == kept_.end()) return kept_.back().served;
  found->asked = options_.clock->Now();
  return found->served;
}

void SnapshotHolder::Swap(std::shared_ptr<const ServedModel> served) {
  const absl::Time oldest = options_.clock->Now() - kKeep;
  absl::MutexLock lock(&mu_);
  // All but the last one, which stays as the one before.
  if (!kept_.empty()) {
    kept_.erase(std::remove_if(kept_.begin(), kept_.end() - 1, [&](const Kept& kept) { return kept.asked < oldest; }),
                kept_.end() - 1);
  }
  if (kept_.size() == kMostKept) kept_.erase(kept_.begin());
  kept_.push_back({std::move(served)});
}

SnapshotVersion SnapshotHolder::version() const {
  const std::shared_ptr<const ServedModel> served = Get();
  return served == nullptr ? SnapshotVersion{} : served->version;
}

}  // namespace orrery
