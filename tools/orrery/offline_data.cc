#include "tools/orrery/offline_data.h"

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/envs/environment.h"
#include "libs/envs/tasks.h"
#include "libs/learning/mirror.h"
#include "libs/replay/episode_index.h"

namespace orrery {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(60);
constexpr absl::Duration kRetryWait = absl::Milliseconds(500);
constexpr int kChangesPerRead = 1000;
constexpr size_t kChunksPerRead = 32;

class StoredWatcher : public ChunkWatcher {
 public:
  StoredWatcher(Store* store, const std::vector<ChunkInfo>& chunks) : store_(store) {
    for (const ChunkInfo& chunk : chunks) unread_.push_back(chunk.key);
  }

  absl::StatusOr<Event> Next(absl::Time deadline) override {
    while (true) {
      if (closed()) return absl::CancelledError("the watcher was closed");
      Event event;
      if (!read_.empty()) {
        event.appended = std::move(read_.front());
        read_.pop_front();
        return event;
      }
      if (unread_.empty()) {
        event.caught_up = true;
        if (!std::exchange(caught_up_, true)) return event;
        return AwaitClose(deadline);
      }
      const absl::Status status = Read();
      if (absl::IsUnavailable(status)) {
        LogWarning("store does not answer error=\"{}\"; trying again", status.ToString());
        return AwaitClose(std::min(deadline, absl::Now() + kRetryWait));
      }
      RETURN_IF_ERROR(status);
    }
  }

  void Close() override {
    absl::MutexLock lock(&mu_);
    closed_ = true;
  }

 private:
  bool closed() {
    absl::MutexLock lock(&mu_);
    return closed_;
  }
  absl::Status AwaitClose(absl::Time deadline) {
    absl::MutexLock lock(&mu_);
    if (mu_.AwaitWithDeadline(absl::Condition(&closed_), deadline)) return absl::CancelledError("the watcher was closed");
    return absl::DeadlineExceededError("no change of the data set until the deadline");
  }
  // The next few chunks. Those that were evicted meanwhile are left out.
  absl::Status Read() {
    const size_t count = std::min(unread_.size(), kChunksPerRead);
    const std::vector<ChunkKey> keys(unread_.begin(), unread_.begin() + static_cast<int64_t>(count));
    ASSIGN_OR_RETURN(std::vector<std::optional<Chunk>> chunks, store_->Read(keys));
    unread_.erase(unread_.begin(), unread_.begin() + static_cast<int64_t>(count));
    for (std::optional<Chunk>& chunk : chunks) {
      if (chunk.has_value()) read_.push_back(*std::move(chunk));
    }
    return absl::OkStatus();
  }

  Store* const store_;
  // The consumer's.
  std::deque<ChunkKey> unread_;
  std::deque<Chunk> read_;
  bool caught_up_ = false;

  absl::Mutex mu_;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

class OfflineReplay : public ReplayClient {
 public:
  OfflineReplay(std::string data_set, int64_t rows) : ReplayClient(nullptr, std::move(data_set)), rows_(rows) {}

  absl::StatusOr<int64_t> AcquireLearner(const std::string&, absl::Time) override { return 1; }
  absl::StatusOr<RunCoordinator::Grant> ReserveUpdates(int64_t, int64_t, int32_t wanted, absl::Time) override {
    RunCoordinator::Grant grant;
    grant.updates = wanted;
    return grant;
  }
  absl::Status ReleaseLearner(int64_t, int64_t, absl::Time) override { return absl::OkStatus(); }
  absl::Status PutSnapshot(const Store::Snapshot&, absl::Time) override { return absl::OkStatus(); }
  absl::StatusOr<replay::v1::GetStatsResponse> GetStats(absl::Time) override {
    replay::v1::GetStatsResponse response;
    response.set_rows_appended(rows_);
    return response;
  }

 private:
  const int64_t rows_;
};

// NOT_FOUND unless it is there: opening a store would make it.
absl::Status CheckThere(const OfflineData::Options& options) {
  ASSIGN_OR_RETURN(const std::vector<DataSetSummary> there, ListDataSets(options.location, kTimeout));
  std::vector<std::string> names;
  for (const DataSetSummary& data_set : there) {
    if (data_set.run == options.data_set) return absl::OkStatus();
    names.push_back(absl::StrCat("\"", data_set.run, "\""));
  }
  return absl::NotFoundError(absl::StrCat("data set \"", options.data_set, "\" is not in the store; ",
                                          names.empty() ? "it has none" : absl::StrCat("it has ", absl::StrJoin(names, ", "))));
}

// Of the configured environment; nothing where its task is not known to this program.
absl::StatusOr<std::optional<uint64_t>> SpecificationHash(const config::v1::Environment& environment) {
  const absl::StatusOr<std::vector<EnvironmentOptions>> tasks = TaskOptions(environment);
  if (absl::IsNotFound(tasks.status())) return std::optional<uint64_t>();
  RETURN_IF_ERROR(tasks.status());
  const absl::StatusOr<std::unique_ptr<Environment>> made = MakeEnvironment(tasks->front());
  if (absl::IsNotFound(made.status())) return std::optional<uint64_t>();
  RETURN_IF_ERROR(made.status());
  return std::optional<uint64_t>(Hash((*made)->spec()));
}

}  // namespace

absl::StatusOr<std::unique_ptr<OfflineData>> OfflineData::Open(const Options& options) {
  std::unique_ptr<OfflineData> data(new OfflineData(options.data_set));
  const std::string name = absl::StrCat("data set \"", options.data_set, "\"");
  RETURN_IF_ERROR(CheckThere(options));
  ASSIGN_OR_RETURN(data->store_, OpenStore({.location = options.location, .run = options.data_set, .timeout = kTimeout}));
  RETURN_IF_ERROR(Annotate(data->ReadIndex(options.experiment.learning().sequence_length()), name));
  RETURN_IF_ERROR(Annotate(data->CheckRows(options.experiment), name));
  return data;
}

absl::Status OfflineData::ReadIndex(int sequence_length) {
  std::map<ChunkKey, ChunkInfo> live;
  ChangeBatch batch;
  while (!batch.caught_up) {
    ASSIGN_OR_RETURN(batch, store_->Changes(batch.cursor, kChangesPerRead, absl::ZeroDuration()));
    for (const Change& change : batch.changes) {
      if (change.kind == Change::Kind::kEvict) {
        live.erase(change.info.key);
      } else if (change.info.mode != EpisodeMode::kEvaluate) {
        live.emplace(change.info.key, change.info);
      }
    }
  }
  EpisodeIndex index(sequence_length);
  for (const auto& [key, info] : live) {
    index.Append(info);
    chunks_.push_back(info);
  }
  rows_ = index.totals().rows;
  if (rows_ == 0) return absl::FailedPreconditionError("no rows are stored, expected those of training episodes");
  if (index.valid_starts() > 0) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("none of its ", index.totals().episodes,
                                                    " episodes has as many rows as learning.sequence_length, ",
                                                    sequence_length));
}

absl::Status OfflineData::CheckRows(const config::v1::Experiment& experiment) const {
  Mirror::Options options;
  options.model = experiment.model();
  options.max_rows = 1;
  ASSIGN_OR_RETURN(const std::unique_ptr<Mirror> mirror, Mirror::Create(options));
  const int64_t bytes = experiment.learning().mirror_bytes();
  if (rows_ > bytes / mirror->row_bytes()) {
    return absl::ResourceExhaustedError(absl::StrCat("its ", rows_, " rows of ", mirror->row_bytes(),
                                                     " bytes each are more than learning.mirror_bytes ", bytes));
  }
  ASSIGN_OR_RETURN(const std::optional<uint64_t> expected, SpecificationHash(experiment.environment()));
  std::set<uint64_t> seen;
  for (const ChunkInfo& info : chunks_) {
    if (!seen.insert(info.specification_hash).second) continue;
    ASSIGN_OR_RETURN(std::vector<std::optional<Chunk>> chunk, store_->Read({info.key}));
    if (!chunk[0].has_value()) continue;  // evicted meanwhile
    ChunkWatcher::Event event;
    event.appended = *std::move(chunk[0]);
    RETURN_IF_ERROR(mirror->Apply(std::move(event)));
    if (!expected.has_value() || info.specification_hash == *expected) continue;
    return absl::FailedPreconditionError(absl::StrFormat(
        "the specification hash of episode %d is %016x, expected %016x, that of the configured environment: it has other "
        "observations or actions",
        info.key.episode_id, info.specification_hash, *expected));
  }
  return absl::OkStatus();
}

std::unique_ptr<ChunkWatcher> OfflineData::MakeWatcher() const {
  return std::make_unique<StoredWatcher>(store_.get(), chunks_);
}

std::shared_ptr<ReplayClient> OfflineData::MakeReplay() const { return std::make_shared<OfflineReplay>(data_set_, rows_); }

}  // namespace orrery
