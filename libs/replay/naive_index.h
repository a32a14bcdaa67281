// The obvious model of an index, for tests of what samples.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "libs/replay/episode_index.h"
#include "libs/replay/store.h"

namespace orrery {

using Start = std::pair<int64_t, int64_t>;  // episode, row

inline ChunkInfo Info(int64_t episode, int64_t first_row, int32_t rows, EpisodeMode mode = EpisodeMode::kTrain, int task = 0) {
  ChunkInfo info;
  info.key = {episode, first_row};
  info.rows = rows;
  info.mode = mode;
  info.payload_bytes = rows * 10;
  info.task = task;
  return info;
}

// A set of live rows, and every start tried. Chunks must not overlap.
class NaiveIndex {
 public:
  explicit NaiveIndex(int length) : length_(length) {}
  void Append(const ChunkInfo& info) {
    if (!chunks_.emplace(info.key, info).second) return;
    order_.push_back(info.key);
    priorities_[info.key] = largest_priority_;
  }
  void Evict(const ChunkKey& key) {
    if (chunks_.erase(key) > 0) order_.erase(std::find(order_.begin(), order_.end(), key));
  }
  void SetPriority(const ChunkKey& key, double priority) {
    if (!chunks_.contains(key)) return;
    priorities_[key] = priority;
    largest_priority_ = std::max(largest_priority_, chunks_.at(key).mode == EpisodeMode::kEvaluate ? 1 : priority);
  }
  // Forgets in which order the chunks arrived: now it is that of their keys.
  void SortByKey() { std::sort(order_.begin(), order_.end()); }

  std::set<Start> Starts() const {
    std::set<Start> rows, starts;
    for (const auto& [key, info] : chunks_) {
      if (info.mode == EpisodeMode::kEvaluate) continue;
      for (int i = 0; i < info.rows; ++i) rows.insert({key.episode_id, key.first_row + i});
    }
    for (const auto& [episode, row] : rows) {
      int64_t n = 0;
      while (n < length_ && rows.count({episode, row + n}) > 0) ++n;
      if (n == length_) starts.insert({episode, row});
    }
    return starts;
  }
  // Those whose last row is in one of the newest training chunks, as many as hold `rows` rows.
  std::set<Start> NewestStarts(int64_t rows) const {
    std::set<Start> starts, newest;
    for (auto key = order_.rbegin(); key != order_.rend() && rows > 0; ++key) {
      const ChunkInfo& info = chunks_.at(*key);
      if (info.mode == EpisodeMode::kEvaluate) continue;
      rows -= info.rows;
      for (int i = 0; i < info.rows; ++i) newest.insert({key->episode_id, key->first_row + i});
    }
    for (const auto& [episode, row] : Starts()) {
      if (newest.contains({episode, row + length_ - 1})) starts.insert({episode, row});
    }
    return starts;
  }
  // The same chunks for sequences of another length.
  NaiveIndex WithLength(int length) const {
    NaiveIndex other = *this;
    other.length_ = length;
    return other;
  }
  // With what probability a sampler by priority draws each start.
  std::map<Start, double> Prioritized(double exponent, double uniform_share) const {
    std::map<Start, double> weights;
    double sum = 0;
    for (const Start& start : Starts()) {
      const ChunkKey chunk = std::prev(chunks_.upper_bound({start.first, start.second}))->first;
      sum += weights[start] = std::pow(priorities_.at(chunk), exponent);
    }
    const double each = 1 / static_cast<double>(weights.size());
    for (auto& [start, weight] : weights) {
      weight = uniform_share * each + (1 - uniform_share) * (sum > 0 ? weight / sum : each);
    }
    return weights;
  }
  IndexTotals Totals() const {
    IndexTotals totals;
    std::set<int64_t> episodes;
    for (const auto& [key, info] : chunks_) {
      totals.rows += info.rows;
      totals.bytes += info.payload_bytes;
      totals.chunks += 1;
      episodes.insert(key.episode_id);
    }
    totals.episodes = static_cast<int64_t>(episodes.size());
    return totals;
  }
  std::vector<ChunkKey> OldestBeyond(int64_t max_rows, int64_t max_bytes) const {
    IndexTotals totals = Totals();
    std::vector<ChunkKey> keys;
    for (const ChunkKey& key : order_) {
      if (totals.rows <= max_rows && totals.bytes <= max_bytes) break;
      totals.rows -= chunks_.at(key).rows;
      totals.bytes -= chunks_.at(key).payload_bytes;
      keys.push_back(key);
    }
    return keys;
  }
  const std::map<ChunkKey, ChunkInfo>& chunks() const { return chunks_; }

 private:
  int64_t length_;
  std::map<ChunkKey, ChunkInfo> chunks_;
  std::vector<ChunkKey> order_;
  std::map<ChunkKey, double> priorities_;
  double largest_priority_ = 1;
};

// The slices must cover exactly the rows of the sequence, from live chunks.
inline void ExpectSound(const Sequence& sequence, const NaiveIndex& model, int length) {
  int64_t row = sequence.first_row;
  for (const ChunkSlice& slice : sequence.slices) {
    const auto chunk = model.chunks().find(slice.key);
    ASSERT_NE(chunk, model.chunks().end());
    ASSERT_EQ(slice.key.episode_id, sequence.episode_id);
    ASSERT_EQ(slice.key.first_row + slice.begin, row);
    ASSERT_GE(slice.begin, 0);
    ASSERT_GE(slice.rows, 1);
    ASSERT_LE(slice.begin + slice.rows, chunk->second.rows);
    row += slice.rows;
  }
  ASSERT_EQ(row, sequence.first_row + length);
}

inline void ExpectSameTotals(const IndexTotals& a, const IndexTotals& b) {
  ASSERT_EQ(a.rows, b.rows);
  ASSERT_EQ(a.bytes, b.bytes);
  ASSERT_EQ(a.chunks, b.chunks);
  ASSERT_EQ(a.episodes, b.episodes);
}

// Chi-square: `counts` of independent draws against the number of draws expected of each start.
inline void ExpectProportional(const std::map<Start, int>& counts, const std::function<double(const Start&)>& expected) {
  double chi_square = 0;
  for (const auto& [start, count] : counts) {
    ASSERT_GT(expected(start), 0) << "episode " << start.first << " row " << start.second;
    const double difference = count - expected(start);
    chi_square += difference * difference / expected(start);
  }
  // Mean n - 1, standard deviation sqrt(2 (n - 1)): four deviations off is one in ten thousand, and the seed is fixed.
  const double freedom = static_cast<double>(counts.size()) - 1;
  EXPECT_LT(chi_square, freedom + 4 * std::sqrt(2 * freedom));
}

}  // namespace orrery
