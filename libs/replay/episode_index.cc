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

// What the index needs of a chunk: there may be millions.
struct LiveChunk {
  int64_t arrival = 0;
  int64_t payload_bytes = 0;
  uint32_t rows : 31 = 0;
  uint32_t sampled : 1 = 0;                  // part of a run
  uint32_t slot = ChunkPriorities::kNoSlot;  // if sampled and priorities are kept
};
static_assert(sizeof(LiveChunk) == 24);

// Consecutive rows [first, end) of one episode; `slot` in the tree holds the number of valid starts.
struct Run {
  int64_t end = 0;
  size_t slot = 0;
};

struct Slot {
  int64_t episode_id = 0;
  int64_t first = 0;
};

// The runs of one task, each with its number of valid starts.
struct Task {
  FenwickTree tree;
  std::vector<Slot> slots;
  std::vector<size_t> free_slots;
};

struct Episode {
  Task* task = nullptr;
  std::map<int64_t, LiveChunk> chunks;  // by first row
  std::map<int64_t, Run> runs;          // by first row
};

}  // namespace

struct EpisodeIndex::Impl {
  explicit Impl(int length) : sequence_length(length) {}

  int64_t Starts(int64_t first, int64_t end) const { return std::max<int64_t>(0, end - first - sequence_length + 1); }

  void AddRun(int64_t episode_id, Episode& episode, int64_t first, int64_t end) {
    Task& task = *episode.task;
    if (task.free_slots.empty()) {
      task.free_slots.push_back(task.tree.size());
      task.tree.Grow();
      task.slots.emplace_back();
    }
    const size_t slot = task.free_slots.back();
    task.free_slots.pop_back();
    task.slots[slot] = {episode_id, first};
    task.tree.Set(slot, Starts(first, end));
    episode.runs.emplace(first, Run{end, slot});
  }

  void RemoveRun(Episode& episode, std::map<int64_t, Run>::iterator run) {
    episode.task->tree.Set(run->second.slot, 0);
    episode.task->free_slots.push_back(run->second.slot);
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

  // How many sequences begin in a sampled chunk.
  int32_t StartsIn(const Episode& episode, int64_t first, const LiveChunk& chunk) const {
    const auto run = std::prev(episode.runs.upper_bound(first));
    const int64_t end = std::min(first + chunk.rows, run->second.end - sequence_length + 1);
    return static_cast<int32_t>(std::max<int64_t>(0, end - first));
  }

  // Counts the starts again after rows [first, end) came or went: also in the chunks before, whose sequences reach into them.
  void CountStarts(const Episode& episode, int64_t first, int64_t end) {
    auto chunk = episode.chunks.upper_bound(first - sequence_length + 1);
    if (chunk != episode.chunks.begin()) --chunk;
    while (chunk != episode.chunks.begin() && !chunk->second.sampled) --chunk;
    for (; chunk != episode.chunks.end() && chunk->first < end; ++chunk) {
      if (!chunk->second.sampled) continue;
      priorities->SetStarts(chunk->second.slot, StartsIn(episode, chunk->first, chunk->second));
    }
  }

  // From here on priorities are kept, with `largest` for every chunk.
  void KeepPriorities(double largest) {
    priorities = std::make_unique<ChunkPriorities>(largest);
    for (const auto& [arrival, key] : arrivals) {
      Episode& episode = episodes.at(key.episode_id);
      LiveChunk& chunk = episode.chunks.at(key.first_row);
      if (!chunk.sampled) continue;
      chunk.slot = priorities->Add(key);
      priorities->SetStarts(chunk.slot, StartsIn(episode, key.first_row, chunk));
    }
  }

  const LiveChunk* Find(const ChunkKey& key) const {
    const auto episode = episodes.find(key.episode_id);
    if (episode == episodes.end()) return nullptr;
    const auto chunk = episode->second.chunks.find(key.first_row);
    return chunk == episode->second.chunks.end() ? nullptr : &chunk->second;
  }

  // The slices of the sequence that begins there.
  Sequence SequenceAt(int64_t episode_id, int64_t first_row) const {
    Sequence sequence{episode_id, first_row, {}};
    const auto& chunks = episodes.at(episode_id).chunks;
    int64_t row = first_row;
    const int64_t end = row + sequence_length;
    // The chunk that holds `row`: the last sampled one that begins at or before it.
    auto chunk = std::prev(chunks.upper_bound(row));
    while (!chunk->second.sampled) --chunk;
    for (; row < end; ++chunk) {
      if (!chunk->second.sampled) continue;
      const int64_t first = chunk->first;
      const int64_t stop = std::min(end, first + chunk->second.rows);
      sequence.slices.push_back(
          {{episode_id, first}, static_cast<int32_t>(row - first), static_cast<int32_t>(stop - row)});
      row = stop;
    }
    return sequence;
  }

  // The sequence at a position in [0, starts of the task).
  Sequence SequenceAtPosition(const Task& task, int64_t position) const {
    const auto [slot, offset] = task.tree.Find(position);
    return SequenceAt(task.slots[slot].episode_id, task.slots[slot].first + offset);
  }

  int64_t ValidStarts() const {
    int64_t starts = 0;
    for (const auto& [number, task] : tasks) starts += task.tree.total();
    return starts;
  }

  const int sequence_length;
  std::map<int, Task> tasks;  // those seen so far; pointers into it stay valid
  std::unordered_map<int64_t, Episode> episodes;
  std::map<int64_t, ChunkKey> arrivals;
  int64_t next_arrival = 0;
  IndexTotals totals;
  std::unique_ptr<ChunkPriorities> priorities;  // of the sampled chunks; null: nobody asked for them, all are 1
};

EpisodeIndex::EpisodeIndex(int sequence_length) : impl_(std::make_unique<Impl>(std::max(1, sequence_length))) {}
EpisodeIndex::~EpisodeIndex() = default;

void EpisodeIndex::Append(const ChunkInfo& info) {
  if (info.rows < 1) return;
  const int64_t id = info.key.episode_id;
  Episode& episode = impl_->episodes[id];
  if (episode.task == nullptr) episode.task = &impl_->tasks[info.task];
  const auto [chunk, is_new] = episode.chunks.try_emplace(info.key.first_row);
  if (!is_new) return;
  LiveChunk& live = chunk->second;
  live.arrival = impl_->next_arrival++;
  live.payload_bytes = info.payload_bytes;
  live.rows = static_cast<uint32_t>(info.rows);
  impl_->arrivals.emplace(live.arrival, info.key);
  IndexTotals& totals = impl_->totals;
  totals.rows += info.rows;
  totals.bytes += info.payload_bytes;
  totals.chunks += 1;
  totals.episodes += episode.chunks.size() == 1;
  // A chunk that overlaps another one (a client's mistake) is kept but not sampled: its rows would count twice.
  const int64_t first = info.key.first_row, end = first + info.rows;
  live.sampled = info.mode != EpisodeMode::kEvaluate && impl_->AddRows(id, episode, first, end);
  if (!live.sampled || impl_->priorities == nullptr) return;
  live.slot = impl_->priorities->Add(info.key);
  impl_->CountStarts(episode, first, end);
}

void EpisodeIndex::Evict(const ChunkKey& key) {
  const auto episode = impl_->episodes.find(key.episode_id);
  if (episode == impl_->episodes.end()) return;
  const auto chunk = episode->second.chunks.find(key.first_row);
  if (chunk == episode->second.chunks.end()) return;
  const LiveChunk live = chunk->second;
  const int64_t end = key.first_row + live.rows;
  if (live.sampled) impl_->RemoveRows(key.episode_id, episode->second, key.first_row, end);
  IndexTotals& totals = impl_->totals;
  totals.rows -= live.rows;
  totals.bytes -= live.payload_bytes;
  totals.chunks -= 1;
  impl_->arrivals.erase(live.arrival);
  episode->second.chunks.erase(chunk);
  if (live.sampled && impl_->priorities != nullptr) {
    impl_->priorities->Remove(live.slot);
    impl_->CountStarts(episode->second, key.first_row, end);
  }
  if (episode->second.chunks.empty()) {
    totals.episodes -= 1;
    impl_->episodes.erase(episode);
  }
}

std::optional<Sequence> EpisodeIndex::Sample(std::mt19937_64& random) const {
  const int64_t starts = impl_->ValidStarts();
  if (starts == 0) return std::nullopt;
  int64_t position = std::uniform_int_distribution<int64_t>(0, starts - 1)(random);
  auto task = impl_->tasks.begin();
  for (; position >= task->second.tree.total(); ++task) position -= task->second.tree.total();
  return impl_->SequenceAtPosition(task->second, position);
}

std::optional<Sequence> EpisodeIndex::SampleTask(int task, std::mt19937_64& random) const {
  const auto found = impl_->tasks.find(task);
  if (found == impl_->tasks.end() || found->second.tree.total() == 0) return std::nullopt;
  const int64_t position = std::uniform_int_distribution<int64_t>(0, found->second.tree.total() - 1)(random);
  return impl_->SequenceAtPosition(found->second, position);
}

bool EpisodeIndex::SetPriority(const ChunkKey& key, double priority) {
  if (impl_->Find(key) == nullptr) return false;
  if (impl_->priorities == nullptr) impl_->KeepPriorities(1);
  const uint32_t slot = impl_->Find(key)->slot;
  if (slot != ChunkPriorities::kNoSlot) impl_->priorities->SetPriority(slot, priority);
  return true;
}

void EpisodeIndex::CopyPriorities(const EpisodeIndex& other) {
  if (other.impl_->priorities == nullptr) return;
  impl_->KeepPriorities(other.impl_->priorities->largest());
  for (const auto& [arrival, key] : impl_->arrivals) {
    const LiveChunk* from = other.impl_->Find(key);
    const LiveChunk& to = *impl_->Find(key);
    if (from == nullptr || from->slot == ChunkPriorities::kNoSlot || to.slot == ChunkPriorities::kNoSlot) continue;
    impl_->priorities->SetPriority(to.slot, other.impl_->priorities->priority(from->slot));
  }
}

std::optional<Sequence> EpisodeIndex::SamplePrioritized(double exponent, std::mt19937_64& random) {
  if (impl_->priorities == nullptr) impl_->KeepPriorities(1);
  const ChunkPriorities& priorities = *impl_->priorities;
  const std::optional<uint32_t> slot = impl_->priorities->Draw(exponent, random);
  if (!slot.has_value()) return Sample(random);
  const int64_t offset = std::uniform_int_distribution<int64_t>(0, priorities.starts(*slot) - 1)(random);
  return impl_->SequenceAt(priorities.key(*slot).episode_id, priorities.key(*slot).first_row + offset);
}

double EpisodeIndex::PrioritizedProbability(double exponent, const ChunkKey& key) {
  if (impl_->priorities == nullptr) impl_->KeepPriorities(1);
  const std::optional<double> probability = impl_->priorities->Probability(exponent, impl_->Find(key)->slot);
  return probability.value_or(1 / static_cast<double>(impl_->ValidStarts()));
}

Sequence EpisodeIndex::SequenceAt(int64_t episode_id, int64_t first_row) const {
  return impl_->SequenceAt(episode_id, first_row);
}

std::vector<StartRange> EpisodeIndex::NewestStarts(int64_t rows) const {
  std::vector<StartRange> ranges;
  for (auto it = impl_->arrivals.rbegin(); it != impl_->arrivals.rend() && rows > 0; ++it) {
    const Episode& episode = impl_->episodes.at(it->second.episode_id);
    const auto& [first, chunk] = *episode.chunks.find(it->second.first_row);
    if (!chunk.sampled) continue;
    rows -= chunk.rows;
    const auto run = std::prev(episode.runs.upper_bound(first));
    // Sequences that end at rows [first, first + rows) of the chunk and begin inside the run.
    const int64_t lowest = std::max(run->first, first - impl_->sequence_length + 1);
    const int64_t starts = first + chunk.rows - impl_->sequence_length + 1 - lowest;
    if (starts > 0) ranges.push_back({it->second.episode_id, lowest, starts});
  }
  return ranges;
}

int64_t EpisodeIndex::valid_starts() const { return impl_->ValidStarts(); }

std::map<int, int64_t> EpisodeIndex::task_starts() const {
  std::map<int, int64_t> starts;
  for (const auto& [number, task] : impl_->tasks) {
    if (task.tree.total() > 0) starts[number] = task.tree.total();
  }
  return starts;
}

IndexTotals EpisodeIndex::totals() const { return impl_->totals; }

std::vector<ChunkKey> EpisodeIndex::OldestBeyond(int64_t max_rows, int64_t max_bytes) const {
  std::vector<ChunkKey> keys;
  int64_t rows = impl_->totals.rows, bytes = impl_->totals.bytes;
  for (auto it = impl_->arrivals.begin(); it != impl_->arrivals.end() && (rows > max_rows || bytes > max_bytes); ++it) {
    const LiveChunk& chunk = impl_->episodes.at(it->second.episode_id).chunks.at(it->second.first_row);
    rows -= chunk.rows;
    bytes -= chunk.payload_bytes;
    keys.push_back(it->second);
  }
  return keys;
}

}  // namespace orrery
