#include "services/replay/data_set.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/telemetry/metrics.h"

namespace orrery {
namespace {
constexpr int kChangesPerRead = 1000;
constexpr absl::Duration kChangesWait = absl::Milliseconds(200);
constexpr absl::Duration kRetryWait = absl::Milliseconds(500);
constexpr absl::Duration kProgressEvery = absl::Seconds(2);
constexpr size_t kMaxIndexes = 4;
constexpr size_t kPrioritiesAtOnce = 1024;  // others wait meanwhile
}  // namespace

DataSet::DataSet(Store* store, Limits limits, int sequence_length, prometheus::Registry& registry)
    : store_(store),
      limits_(limits),
      default_length_(sequence_length),
      steps_(AddGauge(registry, "replay_steps", "Rows stored now, evaluation included.")),
      episodes_(AddGauge(registry, "replay_episodes", "Episodes of which a chunk is stored now.")),
      bytes_(AddGauge(registry, "replay_bytes", "Bytes of encoded chunks stored now.")),
      next_progress_(absl::Now() + kProgressEvery) {
  absl::MutexLock lock(&mu_);
  Clear();
}

DataSet::~DataSet() { Stop(); }

void DataSet::Start(std::function<void(bool)> on_ready) {
  on_ready_ = std::move(on_ready);
  thread_ = std::thread([this] { Run(); });
}

void DataSet::Stop() {
  bell_.Stop();
  if (thread_.joinable()) thread_.join();
}

bool DataSet::caught_up() const {
  absl::MutexLock lock(&mu_);
  return caught_up_;
}

bool DataSet::Contains(const ChunkKey& key) const {
  absl::MutexLock lock(&mu_);
  return live_.contains(key);
}

IndexTotals DataSet::totals() const {
  absl::MutexLock lock(&mu_);
  return indexes_.find(default_length_)->second.index->totals();
}

std::vector<Sequence> DataSet::Sample(const Sampler& sampler, int sequence_length, int count, std::mt19937_64& random) {
  absl::MutexLock lock(&mu_);
  return sampler.Draw(IndexFor(sequence_length), count, random);
}

int DataSet::SetPriorities(absl::Span<const ChunkPriority> priorities) {
  int known = 0;
  for (size_t i = 0; i < priorities.size(); i += kPrioritiesAtOnce) {
    absl::MutexLock lock(&mu_);
    for (const ChunkPriority& priority : priorities.subspan(i, kPrioritiesAtOnce)) {
      if (!live_.contains(priority.key)) continue;
      for (auto& [length, entry] : indexes_) entry.index->SetPriority(priority.key, priority.priority);
      ++known;
    }
  }
  return known;
}

std::vector<std::vector<ChunkInfo>> DataSet::Episodes(int64_t first, int max, std::optional<EpisodeMode> mode,
                                                      int64_t& next) const {
  std::vector<std::vector<ChunkInfo>> episodes;
  absl::MutexLock lock(&mu_);
  auto at = live_.lower_bound({first, 0});
  while (at != live_.end() && static_cast<int>(episodes.size()) < max) {
    std::vector<ChunkInfo> episode = TakeEpisode(at);
    if (!mode.has_value() || episode[0].mode == *mode) episodes.push_back(std::move(episode));
  }
  next = at == live_.end() ? 0 : at->first.episode_id;
  return episodes;
}

std::vector<ChunkInfo> DataSet::TakeEpisode(std::map<ChunkKey, ChunkInfo>::const_iterator& at) const {
  std::vector<ChunkInfo> episode;
  const int64_t id = at->first.episode_id;
  for (; at != live_.end() && at->first.episode_id == id; ++at) episode.push_back(at->second);
  return episode;
}

void DataSet::Run() {
  std::string cursor;
  while (!bell_.stopped()) {
    if (!Step(cursor, kChangesWait)) bell_.Await(bell_.rings(), absl::Now() + kRetryWait);
  }
}

bool DataSet::Step(std::string& cursor, absl::Duration wait) {
  absl::StatusOr<ChangeBatch> batch = store_->Changes(cursor, kChangesPerRead, wait);
  if (absl::IsOutOfRange(batch.status())) {
    LogWarning("change log does not reach back to the cursor; reading the live chunks again");
    SetReady(false);
    cursor.clear();
    absl::MutexLock lock(&mu_);
    Clear();
    return true;
  }
  if (!batch.ok()) {
    if (ready_ || cursor.empty()) LogWarning("store does not answer error=\"{}\"; trying again", batch.status().ToString());
    SetReady(false);
    return false;
  }
  Apply(*batch);
  cursor = std::move(batch->cursor);
  EvictOldest();
  if (caught_up()) {
    SetReady(true);
  } else if (absl::Now() >= next_progress_) {
    const IndexTotals now = totals();
    LogInfo("replay reads what is stored chunks={} rows={} bytes={}", now.chunks, now.rows, now.bytes);
    next_progress_ = absl::Now() + kProgressEvery;
  }
  return true;
}

void DataSet::Apply(const ChangeBatch& batch) {
  absl::MutexLock lock(&mu_);
  for (const Change& change : batch.changes) {
    const bool append = change.kind == Change::Kind::kAppend;
    if (append) {
      live_.emplace(change.info.key, change.info);
    } else {
      live_.erase(change.info.key);
    }
    for (auto& [length, entry] : indexes_) {
      if (append) {
        entry.index->Append(change.info);
      } else {
        entry.index->Evict(change.info.key);
      }
    }
  }
  if (batch.changes.empty() && caught_up_) return;
  caught_up_ = caught_up_ || batch.caught_up;
  bell_.Ring();
  const IndexTotals totals = indexes_.find(default_length_)->second.index->totals();
  steps_.Set(static_cast<double>(totals.rows));
  episodes_.Set(static_cast<double>(totals.episodes));
  bytes_.Set(static_cast<double>(totals.bytes));
}

int64_t DataSet::clears() const {
  absl::MutexLock lock(&mu_);
  return clears_;
}

void DataSet::Clear() {
  ++clears_;
  live_.clear();
  indexes_.clear();
  indexes_[default_length_].index = std::make_unique<EpisodeIndex>(default_length_);
  caught_up_ = false;
}

void DataSet::EvictOldest() {
  std::vector<ChunkKey> victims;
  {
    absl::MutexLock lock(&mu_);
    const EpisodeIndex& index = *indexes_.find(default_length_)->second.index;
    const IndexTotals totals = index.totals();
    // Before everything is known, what looks oldest may not be.
    if (!caught_up_ || (totals.rows <= limits_.max_rows && totals.bytes <= limits_.max_bytes)) return;
    victims = index.OldestBeyond(limits_.max_rows, limits_.max_bytes);
  }
  if (const absl::Status status = store_->Evict(victims); !status.ok()) {
    LogWarning("eviction failed chunks={} error=\"{}\"", victims.size(), status.ToString());
  }
}

void DataSet::SetReady(bool ready) {
  if (ready == ready_) return;
  ready_ = ready;
  const IndexTotals now = totals();
  LogInfo("replay ready={} chunks={} rows={} bytes={}", ready, now.chunks, now.rows, now.bytes);
  if (on_ready_) on_ready_(ready);
}

EpisodeIndex& DataSet::IndexFor(int sequence_length) {
  LengthIndex& entry = indexes_[sequence_length];
  entry.last_use = ++uses_;
  if (entry.index == nullptr) {
    entry.index = std::make_unique<EpisodeIndex>(sequence_length);
    for (const auto& [key, info] : live_) entry.index->Append(info);
    entry.index->CopyPriorities(*indexes_.find(default_length_)->second.index);
  }
  if (indexes_.size() > kMaxIndexes) {
    auto oldest = indexes_.end();
    for (auto it = indexes_.begin(); it != indexes_.end(); ++it) {
      if (it->first == default_length_ || it->first == sequence_length) continue;
      if (oldest == indexes_.end() || it->second.last_use < oldest->second.last_use) oldest = it;
    }
    indexes_.erase(oldest);
  }
  return *entry.index;
}

}  // namespace orrery
