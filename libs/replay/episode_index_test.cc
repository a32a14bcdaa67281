#include "libs/replay/episode_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "libs/replay/naive_index.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

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

// Each start of the ranges, once.
std::set<Start> StartsOf(const std::vector<StartRange>& ranges) {
  std::set<Start> starts;
  for (const StartRange& range : ranges) {
    for (int64_t i = 0; i < range.starts; ++i) {
      EXPECT_TRUE(starts.insert({range.episode_id, range.first_row + i}).second) << "twice";
    }
  }
  return starts;
}

TEST(EpisodeIndex, FindsTheStartsThatEndInTheNewestRows) {
  EpisodeIndex index(4);
  index.Append(Info(1, 0, 5));
  index.Append(Info(2, 0, 3));
  index.Append(Info(1, 5, 5));
  index.Append(Info(3, 0, 9, EpisodeMode::kEvaluate));
  index.Append(Info(2, 3, 2));
  EXPECT_TRUE(index.NewestStarts(0).empty());
  const std::set<Start> newest = {{2, 0}, {2, 1}};
  EXPECT_EQ(StartsOf(index.NewestStarts(1)), newest);
  EXPECT_EQ(StartsOf(index.NewestStarts(2)), newest);
  const std::set<Start> before = {{2, 0}, {2, 1}, {1, 2}, {1, 3}, {1, 4}, {1, 5}, {1, 6}};
  EXPECT_EQ(StartsOf(index.NewestStarts(3)), before);
  EXPECT_EQ(StartsOf(index.NewestStarts(10)), before);  // the third newest chunk has no row that ends a sequence
  const std::vector<StartRange> all = index.NewestStarts(1000);
  EXPECT_EQ(StartsOf(all).size(), 9u);
  EXPECT_EQ(index.valid_starts(), 9);
  index.Evict({1, 0});
  EXPECT_EQ(StartsOf(index.NewestStarts(3)), (std::set<Start>{{2, 0}, {2, 1}, {1, 5}, {1, 6}}));
}

TEST(EpisodeIndex, KeepsTheTasksApart) {
  EpisodeIndex index(3);
  index.Append(Info(1, 0, 5));
  index.Append(Info(2, 0, 10, EpisodeMode::kTrain, 7));
  index.Append(Info(2, 10, 10));  // an episode has one task
  index.Append(Info(3, 0, 2, EpisodeMode::kTrain, 1));
  EXPECT_EQ(index.task_starts(), (std::map<int, int64_t>{{0, 3}, {7, 18}}));
  EXPECT_EQ(index.valid_starts(), 21);
  std::mt19937_64 random(1);
  EXPECT_EQ(index.SampleTask(1, random), std::nullopt);
  EXPECT_EQ(index.SampleTask(2, random), std::nullopt);
  std::set<int64_t> rows;
  for (int i = 0; i < 1000; ++i) {
    EXPECT_EQ(index.SampleTask(0, random)->episode_id, 1);
    const auto sequence = index.SampleTask(7, random);
    ASSERT_EQ(sequence->episode_id, 2);
    rows.insert(sequence->first_row);
  }
  EXPECT_EQ(rows.size(), 18u);
  index.Evict({2, 0});
  index.Evict({2, 10});
  EXPECT_EQ(index.task_starts(), (std::map<int, int64_t>{{0, 3}}));
  index.Append(Info(2, 0, 10, EpisodeMode::kTrain, 1));
  EXPECT_EQ(index.task_starts(), (std::map<int, int64_t>{{0, 3}, {1, 8}}));
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
                                    episode % 5 == 0 ? EpisodeMode::kEvaluate : EpisodeMode::kTrain, episode % 3);
        index.Append(info);
        model.Append(info);
      } else {
        const ChunkKey key{1 + below(12), below(8) * 7};
        index.Evict(key);
        model.Evict(key);
      }
      if (step % 10 != 0) continue;
      ASSERT_NO_FATAL_FAILURE(ExpectSameTotals(index.totals(), model.Totals())) << "seed " << seed << " step " << step;
      ASSERT_EQ(index.valid_starts(), static_cast<int64_t>(model.Starts().size()));
      EXPECT_EQ(index.OldestBeyond(200, 1500), model.OldestBeyond(200, 1500));
      const int newest_rows = below(100);
      EXPECT_EQ(StartsOf(index.NewestStarts(newest_rows)), model.NewestStarts(newest_rows));
      const std::set<Start> starts = model.Starts();
      std::map<int, int64_t> task_starts;
      for (const Start& start : starts) ++task_starts[static_cast<int>(start.first % 3)];
      EXPECT_EQ(index.task_starts(), task_starts);
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
  EXPECT_EQ(counts.size(), starts.size());
  ExpectProportional(counts, [&](const Start& start) { return starts.contains(start) ? kPerStart : 0; });
}

}  // namespace
}  // namespace orrery
