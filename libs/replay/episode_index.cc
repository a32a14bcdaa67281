#include "libs/replay/episode_index.h"

#include <algorithm>
#include <map>
#include <unordered_map>

namespace orrery {
namespace {

// Weights by slot with sums of prefixes, all in O(log slots).
class FenwickTree {
 public:
  int64_t total() const { return total_; }
  size_t size() const { return weights_.size(); }

  void Grow() {
    weights_.push_back(0);
    const size_t i = weights_.size();
    // Node i covers (i - lowbit(i), i]: the nodes below it are already there.
    int64_t sum = 0;
    for (size_t child = i - 1; child > i - (i & -i); child -= child & -child) sum += nodes_[child];
    nodes_.push_back(sum);
  }

  void Set(size_t slot, int64_t weight) {
    const int64_t change = weight - weights_[slot];
    weights_[slot] = weight;
    total_ += change;
    for (size_t i = slot + 1; i < nodes_.size(); i += i & -i) nodes_[i] += change;
  }

  // The slot that position `position` in [0, total) falls into, and the position within it.
  std::pair<size_t, int64_t> Find(int64_t position) const {
    size_t before = 0;
    size_t step = 1;
    while (step * 2 < nodes_.size()) step *= 2;
    for (; step > 0; step /= 2) {
      const size_t next = before + step;
      if (next < nodes_.size() && nodes_[next] <= position) {
        before = next;
        position -= nodes_[next];
      }
    }
    return {before, position};
  }

 private:
  std::vector<int64_t> weights_;
  std::vector<int64_t> nodes_{0};  // from 1
  int64_t total_ = 0;
};

struct LiveChunk {
  ChunkInfo info;
  int64_t arrival = 0;
  bool sampled = false;  // part of a run
};

// Consecutive rows [first, end) of one episode; `slot` in the tree holds the number of valid starts.
struct Run {
  int64_t end = 0;
  size_t slot = 0;
};

struct Episode {
  std::map<int64_t, LiveChunk> chunks;  // by first row
  std::map<int64_t, Run> runs;          // by first row
};

struct Slot {
  int64_t episode_id = 0;
  int64_t first = 0;
};

}  // namespace

struct EpisodeIndex::Impl {
  explicit Impl(int length) : sequence_length(length) {}

  int64_t Starts(int64_t first, int64_t end) const { return std::max<int64_t>(0, end - first - sequence_length + 1); }

  void AddRun(int64_t episode_id, Episode& episode, int64_t first, int64_t end) {
    if (free_slots.empty()) {
      free_slots.push_back(tree.size());
      tree.Grow();
      slots.emplace_back();
    }
    const size_t slot = free_slots.back();
    free_slots.pop_back();
    slots[slot] = {episode_id, first};
    tree.Set(slot, Starts(first, end));
    episode.runs.emplace(first, Run{end, slot});
  }

  void RemoveRun(Episode& episode, std::map<int64_t, Run>::iterator run) {
    tree.Set(run->second.slot, 0);
    free_slots.push_back(run->second.slot);
    episode.runs.erase(run);
  }

  // Joins [first, end) with its neighbours; false if some of it is there already.
  bool AddRows(int64_t episode_id, Episode& episode, int64_t first, int64_t end) {
    auto after = episode.runs.lower_bound(first);
    if (after != episode.runs.end() && after->first < end) return false;
    if (after != episode.runs.begin()) {
      const auto before = std::prev(after);
      if (before->second.end > first) return false;
      if (before->second.end == first) {
        first = before->first;
        RemoveRun(episode, before);
      }
    }
    if (after != episode.runs.end() && after->first == end) {
      end = after->second.end;
      RemoveRun(episode, after);
    }
    AddRun(episode_id, episode, first, end);
    return true;
  }

  void RemoveRows(int64_t episode_id, Episode& episode, int64_t first, int64_t end) {
    const auto run = std::prev(episode.runs.upper_bound(first));
    const int64_t run_first = run->first, run_end = run->second.end;
    RemoveRun(episode, run);
    if (run_first < first) AddRun(episode_id, episode, run_first, first);
    if (end < run_end) AddRun(episode_id, episode, end, run_end);
  }

  const int sequence_length;
  std::unordered_map<int64_t, Episode> episodes;
  std::map<int64_t, ChunkKey> arrivals;
  int64_t next_arrival = 0;
  IndexTotals totals;
  FenwickTree tree;
  std::vector<Slot> slots;
  std::vector<size_t> free_slots;
};

EpisodeIndex::EpisodeIndex(int sequence_length) : impl_(std::make_unique<Impl>(std::max(1, sequence_length))) {}
EpisodeIndex::~EpisodeIndex() = default;

void EpisodeIndex::Append(const ChunkInfo& info) {
  if (info.rows < 1) return;
  const int64_t id = info.key.episode_id;
  Episode& episode = impl_->episodes[id];
  const auto [chunk, is_new] = episode.chunks.try_emplace(info.key.first_row);
  if (!is_new) return;
  chunk->second = {info, impl_->next_arrival++, false};
  impl_->arrivals.emplace(chunk->second.arrival, info.key);
  IndexTotals& totals = impl_->totals;
  totals.rows += info.rows;
  totals.bytes += info.payload_bytes;
  totals.chunks += 1;
  totals.episodes += episode.chunks.size() == 1;
  // A chunk that overlaps another one (a client's mistake) is kept but not sampled: its rows would count twice.
  chunk->second.sampled = info.mode != EpisodeMode::kEvaluate &&
                          impl_->AddRows(id, episode, info.key.first_row, info.key.first_row + info.rows);
}

void EpisodeIndex::Evict(const ChunkKey& key) {
  const auto episode = impl_->episodes.find(key.episode_id);
  if (episode == impl_->episodes.end()) return;
  const auto chunk = episode->second.chunks.find(key.first_row);
  if (chunk == episode->second.chunks.end()) return;
  const LiveChunk& live = chunk->second;
  if (live.sampled) impl_->RemoveRows(key.episode_id, episode->second, key.first_row, key.first_row + live.info.rows);
  IndexTotals& totals = impl_->totals;
  totals.rows -= live.info.rows;
  totals.bytes -= live.info.payload_bytes;
  totals.chunks -= 1;
  impl_->arrivals.erase(live.arrival);
  episode->second.chunks.erase(chunk);
  if (episode->second.chunks.empty()) {
    totals.episodes -= 1;
    impl_->episodes.erase(episode);
  }
}

std::optional<Sequence> EpisodeIndex::Sample(std::mt19937_64& random) const {
  if (impl_->tree.total() == 0) return std::nullopt;
  std::uniform_int_distribution<int64_t> uniform(0, impl_->tree.total() - 1);
  const auto [slot, offset] = impl_->tree.Find(uniform(random));
  Sequence sequence;
  sequence.episode_id = impl_->slots[slot].episode_id;
  sequence.first_row = impl_->slots[slot].first + offset;
  const auto& chunks = impl_->episodes.at(sequence.episode_id).chunks;
  int64_t row = sequence.first_row;
  const int64_t end = row + impl_->sequence_length;
  // The chunk that holds `row`: the last sampled one that begins at or before it.
  auto chunk = std::prev(chunks.upper_bound(row));
  while (!chunk->second.sampled) --chunk;
  for (; row < end; ++chunk) {
    if (!chunk->second.sampled) continue;
    const int64_t first = chunk->first;
    const int64_t stop = std::min(end, first + chunk->second.info.rows);
    sequence.slices.push_back({chunk->second.info.key, static_cast<int32_t>(row - first), static_cast<int32_t>(stop - row)});
    row = stop;
  }
  return sequence;
}

int64_t EpisodeIndex::valid_starts() const { return impl_->tree.total(); }
IndexTotals EpisodeIndex::totals() const { return impl_->totals; }

std::vector<ChunkKey> EpisodeIndex::OldestBeyond(int64_t max_rows, int64_t max_bytes) const {
  std::vector<ChunkKey> keys;
  int64_t rows = impl_->totals.rows, bytes = impl_->totals.bytes;
  for (auto it = impl_->arrivals.begin(); it != impl_->arrivals.end() && (rows > max_rows || bytes > max_bytes); ++it) {
    const ChunkInfo& info = impl_->episodes.at(it->second.episode_id).chunks.at(it->second.first_row).info;
    rows -= info.rows;
    bytes -= info.payload_bytes;
    keys.push_back(it->second);
  }
  return keys;
}

}  // namespace orrery
