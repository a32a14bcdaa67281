#include "libs/replay/episode_index.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <set>
#include <vector>

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

// What one start is worth: of its whole chunk the index says the same.
void ExpectProbabilities(EpisodeIndex& index, double exponent, const std::map<Start, double>& expected) {
  for (const auto& [start, probability] : expected) {
    const ChunkKey chunk = index.SequenceAt(start.first, start.second).slices[0].key;
    ASSERT_NEAR(index.PrioritizedProbability(exponent, chunk), probability, 1e-9 * probability)
        << "episode " << start.first << " row " << start.second << " exponent " << exponent;
  }
}

TEST(EpisodeIndex, FollowsPrioritiesAsANaiveModelDoes) {
  for (uint64_t seed = 1; seed <= 1000; ++seed) {
    std::mt19937_64 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    const int length = 1 + below(12), rows = 1 + below(7);
    const int first_priority = below(30);  // so many changes came before it
    EpisodeIndex index(length);
    NaiveIndex model(length);
    for (int step = 0; step < 60; ++step) {
      // Chunks on a grid in any order, repeats included.
      const ChunkKey key{1 + below(6), below(8) * rows};
      const int choice = below(10);
      if (choice < 5) {
        const ChunkInfo info = Info(key.episode_id, key.first_row, rows,
                                    key.episode_id == 5 ? EpisodeMode::kEvaluate : EpisodeMode::kTrain, below(2));
        index.Append(info);
        model.Append(info);
      } else if (choice < 7) {
        index.Evict(key);
        model.Evict(key);
      } else if (step >= first_priority) {
        const double priority = choice == 7 ? 0 : std::exp(below(100) / 10.0 - 5);
        EXPECT_EQ(index.SetPriority(key, priority), model.chunks().contains(key));
        model.SetPriority(key, priority);
      }
      if (step < first_priority || step % 3 != 0) continue;
      // More exponents than the index keeps sums for.
      const double exponent = std::vector<double>{0, 0.6, 1, 4}[below(4)];
      const std::map<Start, double> starts = model.Prioritized(exponent, 0);
      ASSERT_NO_FATAL_FAILURE(ExpectProbabilities(index, exponent, starts)) << "seed " << seed << " step " << step;
      for (int i = 0; i < 5; ++i) {
        const auto sequence = index.SamplePrioritized(exponent, random);
        ASSERT_EQ(sequence.has_value(), !starts.empty());
        if (!sequence.has_value()) break;
        ASSERT_GT(starts.at({sequence->episode_id, sequence->first_row}), 0);
        ASSERT_NO_FATAL_FAILURE(ExpectSound(*sequence, model, length));
      }
    }
    // An index for other sequences over the same chunks, in another order.
    EpisodeIndex other(length + 2);
    for (const auto& [key, info] : model.chunks()) other.Append(info);
    other.CopyPriorities(index);
    for (EpisodeIndex* each : {&index, &other}) each->Append(Info(9, 0, 20));
    model.Append(Info(9, 0, 20));
    ASSERT_NO_FATAL_FAILURE(ExpectProbabilities(index, 0.6, model.Prioritized(0.6, 0))) << "seed " << seed;
    const NaiveIndex longer = model.WithLength(length + 2);
    ASSERT_NO_FATAL_FAILURE(ExpectProbabilities(other, 0.6, longer.Prioritized(0.6, 0))) << "seed " << seed;
  }
}

TEST(EpisodeIndex, PrioritiesAreOfLiveChunks) {
  EpisodeIndex index(3);
  index.Append(Info(1, 0, 5));
  EXPECT_FALSE(index.SetPriority({1, 5}, 2));
  EXPECT_TRUE(index.SetPriority({1, 0}, 2));
  index.Append(Info(2, 0, 5, EpisodeMode::kEvaluate));
  index.Append(Info(1, 2, 5));  // overlaps: never sampled
  EXPECT_TRUE(index.SetPriority({2, 0}, 50));
  EXPECT_TRUE(index.SetPriority({1, 2}, 50));
  EXPECT_DOUBLE_EQ(index.PrioritizedProbability(1, {1, 0}), 1.0 / 3);
  index.Append(Info(3, 0, 3));  // begins with 2
  EXPECT_DOUBLE_EQ(index.PrioritizedProbability(1, {3, 0}), 2.0 / 8);
  index.Evict({1, 2});
  index.Evict({2, 0});
  index.Evict({1, 0});
  EXPECT_FALSE(index.SetPriority({1, 0}, 2));
  EXPECT_DOUBLE_EQ(index.PrioritizedProbability(1, {3, 0}), 1);
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
