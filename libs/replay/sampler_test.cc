#include "libs/replay/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
  // How often each start is drawn.
  std::map<Start, int> Count(const Sampler& sampler) {
    std::mt19937_64 random(5);
    std::map<Start, int> counts;
    for (const Start& start : model_.Starts()) counts[start] = 0;
    for (const Sequence& sequence : sampler.Draw(index_, kDraws, random)) {
      ExpectSound(sequence, model_, kLength);
      ++counts[{sequence.episode_id, sequence.first_row}];
    }
    int drawn = 0;
    for (const auto& [start, count] : counts) drawn += count;
    EXPECT_EQ(drawn, kDraws);
    return counts;
  }

  EpisodeIndex index_{kLength};
  NaiveIndex model_{kLength};
};

TEST_F(SamplerTest, UniformDrawsEveryStartEquallyOften) {
  const double starts = static_cast<double>(model_.Starts().size());
  ASSERT_EQ(starts, 36 + 8 + 2 + 4);
  ExpectProportional(Count(*MakeUniformSampler()), [&](const Start&) { return kDraws / starts; });
}

TEST_F(SamplerTest, RecencyMixesTheNewestWithAll) {
  const double starts = static_cast<double>(model_.Starts().size());
  for (const int rows : {1, 9, 20, 1000}) {
    for (const double share : {0.0, 0.3, 0.9}) {
      const std::set<Start> newest = model_.NewestStarts(rows);
      ASSERT_FALSE(newest.empty());
      ASSERT_OK_AND_ASSIGN(const auto sampler, MakeRecencySampler(share, rows));
      ExpectProportional(Count(*sampler), [&](const Start& start) {
        const double recent = newest.contains(start) ? share / static_cast<double>(newest.size()) : 0;
        return kDraws * (recent + (1 - share) / starts);
      });
    }
  }
  // Nothing but the newest.
  ASSERT_OK_AND_ASSIGN(const auto only, MakeRecencySampler(1, 8));
  for (const auto& [start, count] : Count(*only)) EXPECT_EQ(count > 0, start.first == 5) << start.first << " " << start.second;
}

TEST_F(SamplerTest, RecencyFallsBackToAllWhenNoSequenceEndsInTheNewestRows) {
  Append(Info(9, 0, 4), 0);
  ASSERT_TRUE(index_.NewestStarts(4).empty());
  ASSERT_OK_AND_ASSIGN(const auto sampler, MakeRecencySampler(1, 4));
  const double starts = static_cast<double>(model_.Starts().size());
  ExpectProportional(Count(*sampler), [&](const Start&) { return kDraws / starts; });
}

TEST_F(SamplerTest, TasksGetTheirShares) {
  // Task 0 has 36 + 4 starts, task 1 has 8 + 2.
  const auto expect = [&](std::vector<double> weights, double first, double second) {
    ASSERT_OK_AND_ASSIGN(const auto sampler, MakeTaskSampler(std::move(weights)));
    std::map<Start, int> counts = Count(*sampler);
    if (second == 0) {
      for (const auto& [start, count] : counts) ASSERT_EQ(count == 0, start.first == 3);
      std::erase_if(counts, [](const auto& entry) { return entry.first.first == 3; });
    }
    ExpectProportional(counts, [&](const Start& start) { return kDraws * (start.first == 3 ? second / 10 : first / 40); });
  };
  expect({}, 0.5, 0.5);
  expect({1, 1}, 0.5, 0.5);
  expect({2, 6, 100}, 0.25, 0.75);  // nothing is there of the third task
  expect({3}, 1, 0);
}

TEST_F(SamplerTest, DrawsNothingFromNothing) {
  EpisodeIndex empty(kLength);
  std::mt19937_64 random(1);
  ASSERT_OK_AND_ASSIGN(const auto recency, MakeRecencySampler(0.5, 10));
  ASSERT_OK_AND_ASSIGN(const auto tasks, MakeTaskSampler({}));
  ASSERT_OK_AND_ASSIGN(const auto other_task, MakeTaskSampler({0, 0, 1}));
  EXPECT_TRUE(MakeUniformSampler()->Draw(empty, 3, random).empty());
  EXPECT_TRUE(recency->Draw(empty, 3, random).empty());
  EXPECT_TRUE(tasks->Draw(empty, 3, random).empty());
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
}

}  // namespace
}  // namespace orrery
