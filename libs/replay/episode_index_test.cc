#include "libs/replay/episode_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

ChunkInfo Info(int64_t episode, int64_t first_row, int32_t rows, EpisodeMode mode = EpisodeMode::kTrain) {
  ChunkInfo info;
  info.key = {episode, first_row};
  info.rows = rows;
  info.mode = mode;
  info.payload_bytes = rows * 10;
  return info;
}

using Start = std::pair<int64_t, int64_t>;  // episode, row

// The obvious model: a set of live rows, and every start tried.
class NaiveIndex {
 public:
  explicit NaiveIndex(int length) : length_(length) {}
  void Append(const ChunkInfo& info) {
    if (chunks_.emplace(info.key, info).second) order_.push_back(info.key);
  }
  void Evict(const ChunkKey& key) {
    if (chunks_.erase(key) > 0) order_.erase(std::find(order_.begin(), order_.end(), key));
  }
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
  const int64_t length_;
  std::map<ChunkKey, ChunkInfo> chunks_;
  std::vector<ChunkKey> order_;
};

// The slices must cover exactly the rows of the sequence, from live chunks.
void ExpectSound(const Sequence& sequence, const NaiveIndex& model, int length) {
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

void ExpectEqual(const EpisodeIndex& index, const NaiveIndex& model) {
  const IndexTotals a = index.totals(), b = model.Totals();
  ASSERT_EQ(a.rows, b.rows);
  ASSERT_EQ(a.bytes, b.bytes);
  ASSERT_EQ(a.chunks, b.chunks);
  ASSERT_EQ(a.episodes, b.episodes);
  ASSERT_EQ(index.valid_starts(), static_cast<int64_t>(model.Starts().size()));
}

TEST(EpisodeIndex, HasNothingToSampleAtFirst) {
  EpisodeIndex index(5);
  std::mt19937_64 random(1);
  EXPECT_EQ(index.Sample(random), std::nullopt);
  index.Append(Info(1, 0, 4));
  EXPECT_EQ(index.Sample(random), std::nullopt);
  EXPECT_EQ(index.valid_starts(), 0);
  index.Append(Info(1, 4, 1));
  ASSERT_TRUE(index.Sample(random).has_value());
  EXPECT_EQ(index.Sample(random)->slices.size(), 2u);
}

TEST(EpisodeIndex, CountsEvaluationButNeverSamplesIt) {
  EpisodeIndex index(2);
  index.Append(Info(1, 0, 10, EpisodeMode::kEvaluate));
  EXPECT_EQ(index.valid_starts(), 0);
  EXPECT_EQ(index.totals().rows, 10);
  index.Evict({1, 0});
  EXPECT_EQ(index.totals().rows, 0);
  EXPECT_EQ(index.totals().episodes, 0);
}

TEST(EpisodeIndex, KeepsAnOverlappingChunkOutOfSampling) {
  EpisodeIndex index(3);
  index.Append(Info(1, 0, 10));
  index.Append(Info(1, 5, 10));
  index.Append(Info(1, 10, 4));
  EXPECT_EQ(index.totals().rows, 24);
  EXPECT_EQ(index.valid_starts(), 12);
  std::mt19937_64 random(1);
  for (int i = 0; i < 200; ++i) {
    int64_t rows = 0;
    const auto sequence = index.Sample(random);
    ASSERT_TRUE(sequence.has_value());
    for (const ChunkSlice& slice : sequence->slices) {
      EXPECT_NE(slice.key.first_row, 5);
      rows += slice.rows;
    }
    EXPECT_EQ(rows, 3);
  }
  index.Evict({1, 5});
  EXPECT_EQ(index.valid_starts(), 12);
}

TEST(EpisodeIndex, NamesTheOldestInOrderOfArrival) {
  EpisodeIndex index(2);
  index.Append(Info(3, 0, 10));
  index.Append(Info(1, 10, 10));
  index.Append(Info(1, 0, 10));
  EXPECT_THAT(index.OldestBeyond(30, 300), IsEmpty());
  EXPECT_THAT(index.OldestBeyond(29, 300), ElementsAre(ChunkKey{3, 0}));
  EXPECT_THAT(index.OldestBeyond(30, 199), ElementsAre(ChunkKey{3, 0}, ChunkKey{1, 10}));
  EXPECT_EQ(index.OldestBeyond(0, 0).size(), 3u);
}

TEST(EpisodeIndex, AgreesWithANaiveModel) {
  for (const uint64_t seed : {1, 2, 3, 4, 5, 6}) {
    std::mt19937_64 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    const int length = 1 + below(12);
    EpisodeIndex index(length);
    NaiveIndex model(length);
    for (int step = 0; step < 600; ++step) {
      if (below(3) < 2) {
        // Chunks of 7 rows on a grid (the last of an episode shorter), in any order, repeats included.
        const int episode = 1 + below(12), k = below(8);
        const ChunkInfo info = Info(episode, k * 7, k == 7 ? 1 + episode % 7 : 7,
                                    episode % 5 == 0 ? EpisodeMode::kEvaluate : EpisodeMode::kTrain);
        index.Append(info);
        model.Append(info);
      } else {
        const ChunkKey key{1 + below(12), below(8) * 7};
        index.Evict(key);
        model.Evict(key);
      }
      if (step % 10 != 0) continue;
      ASSERT_NO_FATAL_FAILURE(ExpectEqual(index, model)) << "seed " << seed << " step " << step;
      EXPECT_EQ(index.OldestBeyond(200, 1500), model.OldestBeyond(200, 1500));
      const std::set<Start> starts = model.Starts();
      for (int i = 0; i < 20 && !starts.empty(); ++i) {
        const auto sequence = index.Sample(random);
        ASSERT_TRUE(sequence.has_value());
        ASSERT_EQ(starts.count({sequence->episode_id, sequence->first_row}), 1u);
        ASSERT_NO_FATAL_FAILURE(ExpectSound(*sequence, model, length));
      }
    }
  }
}

TEST(EpisodeIndex, SamplesEveryStartEquallyOften) {
  EpisodeIndex index(5);
  NaiveIndex model(5);
  for (const ChunkInfo& info : {Info(1, 0, 50), Info(1, 50, 13), Info(2, 0, 4), Info(3, 0, 5), Info(4, 0, 20),
                                Info(4, 30, 20), Info(5, 0, 8), Info(5, 8, 8), Info(6, 0, 50)}) {
    index.Append(info);
    model.Append(info);
  }
  index.Evict({6, 0});  // leaves an unused slot in the tree
  model.Evict({6, 0});
  const std::set<Start> starts = model.Starts();
  std::map<Start, int> counts;
  std::mt19937_64 random(7);
  constexpr int kPerStart = 500;
  for (size_t i = 0; i < starts.size() * kPerStart; ++i) {
    const auto sequence = index.Sample(random);
    ++counts[{sequence->episode_id, sequence->first_row}];
  }
  double chi_square = 0;
  for (const Start& start : starts) {
    const double difference = counts[start] - kPerStart;
    chi_square += difference * difference / kPerStart;
  }
  EXPECT_EQ(counts.size(), starts.size());
  // Mean n - 1, standard deviation sqrt(2 (n - 1)): four deviations off is one in ten thousand, and the seed is fixed.
  const double freedom = static_cast<double>(starts.size()) - 1;
  EXPECT_LT(chi_square, freedom + 4 * std::sqrt(2 * freedom));
}

}  // namespace
}  // namespace orrery
