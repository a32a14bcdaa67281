#include "libs/replay/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "libs/base/status_matchers.h"
#include "libs/replay/naive_index.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

constexpr int kLength = 5;
constexpr int kDraws = 60'000;

// Two tasks of different size, with gaps and an evaluation episode between.
class SamplerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Append(Info(1, 0, 30), 0);
    Append(Info(2, 0, 4), 0);
    Append(Info(3, 0, 12), 1);
    Append(Info(4, 0, 20, EpisodeMode::kEvaluate), 0);
    Append(Info(1, 30, 10), 0);
    Append(Info(3, 20, 6), 1);
    Append(Info(5, 0, 8), 0);
  }
  void Append(ChunkInfo info, int task) {
    info.task = task;
    index_.Append(info);
    model_.Append(info);
  }
  void SetPriority(const ChunkKey& key, double priority) {
    EXPECT_TRUE(index_.SetPriority(key, priority));
    model_.SetPriority(key, priority);
  }
  // Draws many sequences: each start as often as its probability says, which every sequence carries.
  void ExpectDraws(const Sampler& sampler, const std::function<double(const Start&)>& probability) {
    std::mt19937_64 random(5);
    std::map<Start, int> counts;
    for (const Start& start : model_.Starts()) counts[start] = 0;
    int drawn = 0;
    for (const Sequence& sequence : sampler.Draw(index_, kDraws, random)) {
      const Start start = {sequence.episode_id, sequence.first_row};
      ASSERT_NO_FATAL_FAILURE(ExpectSound(sequence, model_, kLength));
      ASSERT_NEAR(sequence.probability, probability(start), 1e-12) << start.first << " " << start.second;
      ++counts[start];
      ++drawn;
    }
    ASSERT_EQ(drawn, kDraws);
    ASSERT_EQ(counts.size(), model_.Starts().size());
    std::erase_if(counts, [&](const auto& entry) { return entry.second == 0 && probability(entry.first) == 0; });
    ExpectProportional(counts, [&](const Start& start) { return kDraws * probability(start); });
  }

  EpisodeIndex index_{kLength};
  NaiveIndex model_{kLength};
};

TEST_F(SamplerTest, UniformDrawsEveryStartEquallyOften) {
  const double starts = static_cast<double>(model_.Starts().size());
  ASSERT_EQ(starts, 36 + 8 + 2 + 4);
  ExpectDraws(*MakeUniformSampler(), [&](const Start&) { return 1 / starts; });
}

TEST_F(SamplerTest, RecencyMixesTheNewestWithAll) {
  const double starts = static_cast<double>(model_.Starts().size());
  for (const int rows : {1, 9, 20, 1000}) {
    for (const double share : {0.0, 0.3, 0.9}) {
      const std::set<Start> newest = model_.NewestStarts(rows);
      ASSERT_FALSE(newest.empty());
      ASSERT_OK_AND_ASSIGN(const auto sampler, MakeRecencySampler(share, rows));
      ExpectDraws(*sampler, [&](const Start& start) {
        const double recent = newest.contains(start) ? share / static_cast<double>(newest.size()) : 0;
        return recent + (1 - share) / starts;
      });
    }
  }
  // Nothing but the newest.
  ASSERT_OK_AND_ASSIGN(const auto only, MakeRecencySampler(1, 8));
  ExpectDraws(*only, [](const Start& start) { return start.first == 5 ? 0.25 : 0; });
}

TEST_F(SamplerTest, RecencyFallsBackToAllWhenNoSequenceEndsInTheNewestRows) {
  Append(Info(9, 0, 4), 0);
  ASSERT_TRUE(index_.NewestStarts(4).empty());
  ASSERT_OK_AND_ASSIGN(const auto sampler, MakeRecencySampler(1, 4));
  const double starts = static_cast<double>(model_.Starts().size());
  ExpectDraws(*sampler, [&](const Start&) { return 1 / starts; });
}

TEST_F(SamplerTest, TasksGetTheirShares) {
  // Task 0 has 36 + 4 starts, task 1 has 8 + 2.
  const auto expect = [&](std::vector<double> weights, double first, double second) {
    ASSERT_OK_AND_ASSIGN(const auto sampler, MakeTaskSampler(std::move(weights)));
    ExpectDraws(*sampler, [&](const Start& start) { return start.first == 3 ? second / 10 : first / 40; });
  };
  expect({}, 0.5, 0.5);
  expect({1, 1}, 0.5, 0.5);
  expect({2, 6, 100}, 0.25, 0.75);  // nothing is there of the third task
  expect({3}, 1, 0);
}

TEST_F(SamplerTest, PrioritiesCountForTheSequencesThatBeginInAChunk) {
  SetPriority({1, 0}, 3);
  SetPriority({1, 30}, 0.5);
  SetPriority({3, 0}, 0);
  SetPriority({5, 0}, 2);
  ASSERT_OK_AND_ASSIGN(const auto sampler, MakePrioritizedSampler(1, 0.2));
  // 30 starts of 3, 6 of 0.5, 8 of 0, 2 of 1 and 4 of 2.
  const std::map<ChunkKey, double> priorities = {{{1, 0}, 3}, {{1, 30}, 0.5}, {{3, 0}, 0}, {{3, 20}, 1}, {{5, 0}, 2}};
  ExpectDraws(*sampler, [&](const Start& start) {
    const double priority = std::prev(priorities.upper_bound({start.first, start.second}))->second;
    return 0.2 / 50 + 0.8 * priority / (90 + 3 + 0 + 2 + 8);
  });
  for (const double exponent : {0.0, 0.6, 2.0, 10.0}) {
    for (const double share : {0.0, 0.1, 1.0}) {
      ASSERT_OK_AND_ASSIGN(const auto other, MakePrioritizedSampler(exponent, share));
      const std::map<Start, double> expected = model_.Prioritized(exponent, share);
      ExpectDraws(*other, [&](const Start& start) { return expected.at(start); });
    }
  }
}

TEST_F(SamplerTest, PrioritiesFollowWhatComesAndGoes) {
  ASSERT_OK_AND_ASSIGN(const auto sampler, MakePrioritizedSampler(0.7, 0.1));
  const auto expect = [&] {
    const std::map<Start, double> expected = model_.Prioritized(0.7, 0.1);
    ExpectDraws(*sampler, [&](const Start& start) { return expected.at(start); });
  };
  expect();
  SetPriority({5, 0}, 20);
  SetPriority({1, 30}, 0.1);
  expect();
  Append(Info(5, 8, 3), 0);   // with priority 20, and the chunk before it has more starts
  Append(Info(3, 12, 8), 1);  // closes a gap
  expect();
  for (const ChunkKey& key : {ChunkKey{1, 0}, ChunkKey{3, 12}, ChunkKey{5, 0}}) {
    index_.Evict(key);
    model_.Evict(key);
  }
  expect();
  Append(Info(1, 0, 30), 0);  // as new
  expect();
}

TEST_F(SamplerTest, DrawsUniformlyWhileEveryPriorityIsZero) {
  for (const ChunkKey& key : {ChunkKey{1, 0}, ChunkKey{1, 30}, ChunkKey{3, 0}, ChunkKey{3, 20}, ChunkKey{5, 0}}) {
    SetPriority(key, 0);
  }
  ASSERT_OK_AND_ASSIGN(const auto sampler, MakePrioritizedSampler(0.6, 0));
  ExpectDraws(*sampler, [&](const Start&) { return 1.0 / 50; });
}

TEST_F(SamplerTest, DrawsNothingFromNothing) {
  EpisodeIndex empty(kLength);
  std::mt19937_64 random(1);
  ASSERT_OK_AND_ASSIGN(const auto recency, MakeRecencySampler(0.5, 10));
  ASSERT_OK_AND_ASSIGN(const auto tasks, MakeTaskSampler({}));
  ASSERT_OK_AND_ASSIGN(const auto other_task, MakeTaskSampler({0, 0, 1}));
  ASSERT_OK_AND_ASSIGN(const auto prioritized, MakePrioritizedSampler(0.6, 0.1));
  EXPECT_TRUE(MakeUniformSampler()->Draw(empty, 3, random).empty());
  EXPECT_TRUE(recency->Draw(empty, 3, random).empty());
  EXPECT_TRUE(tasks->Draw(empty, 3, random).empty());
  EXPECT_TRUE(prioritized->Draw(empty, 3, random).empty());
  EXPECT_TRUE(other_task->Draw(index_, 3, random).empty());
}

TEST(Sampler, NamesTheNumberThatIsWrong) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const auto refuses = [](const absl::Status& status, const std::string& words) {
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(words)));
  };
  for (const double share : {-0.1, 1.1, nan}) {
    refuses(MakeRecencySampler(share, 10).status(), absl::StrCat("sampler.recency.share is ", share));
  }
  for (const int64_t rows : {int64_t{0}, kMaxNewestRows + 1}) {
    refuses(MakeRecencySampler(0.5, rows).status(), absl::StrCat("sampler.recency.newest_rows is ", rows));
  }
  for (const double weight : {-1.0, nan, infinity}) {
    refuses(MakeTaskSampler({1, weight}).status(), absl::StrCat("sampler.tasks.weights[1] is ", weight));
  }
  refuses(MakeTaskSampler({0, 0}).status(), "add up to 0");
  for (const double wrong : {-0.1, 10.1, nan, infinity}) {
    refuses(MakePrioritizedSampler(wrong, 0).status(), absl::StrCat("sampler.prioritized.exponent is ", wrong));
    refuses(MakePrioritizedSampler(1, wrong).status(), absl::StrCat("sampler.prioritized.uniform_share is ", wrong));
  }
}

}  // namespace
}  // namespace orrery
