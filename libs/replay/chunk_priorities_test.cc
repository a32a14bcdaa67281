#include "libs/replay/chunk_priorities.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "libs/replay/sum_tree.h"

namespace orrery {
namespace {

TEST(SumTree, FindsTheWeightAtEveryPosition) {
  std::mt19937_64 random(1);
  SumTree tree;
  std::vector<int> weights;
  EXPECT_EQ(tree.total(), 0);
  for (int step = 0; step < 500; ++step) {
    const size_t slot = random() % 23;
    const int weight = random() % 3 == 0 ? 0 : static_cast<int>(random() % 9);
    weights.resize(std::max(weights.size(), slot + 1));
    weights[slot] = weight;
    tree.Set(slot, weight);
    double begin = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      for (double within = 0; within < weights[i]; within += 0.5) ASSERT_EQ(tree.Find(begin + within), i) << "step " << step;
      begin += weights[i];
    }
    ASSERT_EQ(tree.total(), begin);  // whole numbers are not rounded
  }
}

TEST(SumTree, ForgetsALargeWeightExactly) {
  SumTree tree;
  for (size_t slot = 0; slot < 5; ++slot) tree.Set(slot, 0.1);
  const double before = tree.total();
  tree.Set(3, 1e200);
  EXPECT_EQ(tree.total(), 1e200);
  EXPECT_EQ(tree.Find(1e199), 3u);
  tree.Set(3, 0.1);
  EXPECT_EQ(tree.total(), before);
}

TEST(SumTree, NeverFindsASlotWithoutWeight) {
  SumTree tree;
  const std::vector<double> weights = {0, 0.1, 0.7, 0, 0.2, 1e-9, 0};
  for (size_t slot = 0; slot < weights.size(); ++slot) tree.Set(slot, weights[slot]);
  // Both ends, and what a rounded product may give.
  EXPECT_EQ(tree.Find(0), 1u);
  EXPECT_EQ(tree.Find(std::nextafter(tree.total(), 0)), 5u);
  EXPECT_EQ(tree.Find(tree.total()), 5u);
  tree.Set(5, 0);
  EXPECT_EQ(tree.Find(tree.total()), 4u);
}

// Chunks with the given starts and priorities, in slots 0, 1, …
ChunkPriorities Make(const std::vector<int32_t>& starts, const std::vector<double>& priorities) {
  ChunkPriorities chunks;
  for (size_t i = 0; i < starts.size(); ++i) {
    EXPECT_EQ(chunks.Add({1, static_cast<int64_t>(i)}), i);
    chunks.SetStarts(static_cast<uint32_t>(i), starts[i]);
    chunks.SetPriority(static_cast<uint32_t>(i), priorities[i]);
  }
  return chunks;
}

TEST(ChunkPriorities, WeighsByThePowerAndTheStarts) {
  ChunkPriorities chunks = Make({4, 1, 0, 2}, {1, 4, 9, 0});
  // 4 * 1 + 1 * 16 + 0 + 0 = 20, 4 * 1 + 1 * 2 = 6, and with exponent 0 all seven starts alike. More exponents than are kept.
  for (int round = 0; round < 3; ++round) {
    EXPECT_DOUBLE_EQ(*chunks.Probability(2, 0), 1.0 / 20);
    EXPECT_DOUBLE_EQ(*chunks.Probability(2, 1), 16.0 / 20);
    EXPECT_EQ(*chunks.Probability(2, 3), 0);
    EXPECT_DOUBLE_EQ(*chunks.Probability(0.5, 1), 2.0 / 6);
    for (const uint32_t slot : {0, 1, 3}) EXPECT_DOUBLE_EQ(*chunks.Probability(0, slot), 1.0 / 7);
  }
  std::mt19937_64 random(1);
  std::map<uint32_t, int> counts;
  for (int i = 0; i < 10'000; ++i) ++counts[*chunks.Draw(2, random)];
  ASSERT_EQ(counts.size(), 2u);
  EXPECT_NEAR(counts[1], 8'000, 4 * std::sqrt(10'000 * 0.8 * 0.2));
}

TEST(ChunkPriorities, DrawsNothingWhereAllWeightsAreZero) {
  std::mt19937_64 random(1);
  ChunkPriorities none;
  EXPECT_EQ(none.Draw(1, random), std::nullopt);
  ChunkPriorities chunks = Make({4, 0}, {0, 5});
  EXPECT_EQ(chunks.Draw(1, random), std::nullopt);
  EXPECT_EQ(chunks.Probability(1, 0), std::nullopt);
  EXPECT_EQ(chunks.Draw(0, random), 0u);
}

TEST(ChunkPriorities, NewOnesHaveTheLargestSoFar) {
  ChunkPriorities chunks = Make({1}, {0.25});
  EXPECT_EQ(chunks.priority(chunks.Add({2, 0})), 1);
  chunks.SetPriority(0, 6);
  chunks.Remove(0);
  const uint32_t slot = chunks.Add({3, 0});
  EXPECT_EQ(slot, 0u) << "the room is used again";
  EXPECT_EQ(chunks.priority(slot), 6);
  EXPECT_EQ(chunks.starts(slot), 0);
}

TEST(ChunkPriorities, TakesTheLargestNumbers) {
  ChunkPriorities chunks = Make({1000, 1000, 1000}, {kMaxPriority, kMaxPriority, kMaxPriority});
  EXPECT_DOUBLE_EQ(*chunks.Probability(kMaxPriorityExponent, 0), 1.0 / 3000);
}

}  // namespace
}  // namespace orrery
