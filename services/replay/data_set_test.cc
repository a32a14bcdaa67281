#include "services/replay/data_set.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "libs/base/log.h"
#include "libs/base/status_matchers.h"
#include "libs/replay/memory_store.h"
#include "libs/replay/naive_index.h"
#include "libs/replay/testing/fault_store.h"

namespace orrery {
namespace {

constexpr int64_t kEverything = std::numeric_limits<int64_t>::max();

Chunk ChunkOf(const ChunkInfo& info) {
  Chunk chunk;
  chunk.run_id = "run";
  chunk.info = info;
  chunk.payload = std::string(info.payload_bytes, 'p');
  return chunk;
}

// A store, a data set that follows it without a thread, and what both must hold. `faults`: every how many-th operation of the
// data set fails; 0: none.
class Followed {
 public:
  Followed(int length, DataSet::Limits limits, int change_log_length, int faults)
      : length_(length),
        limits_(limits),
        store_(MakeMemoryStore({.change_log_length = change_log_length})),
        faulty_(store_.get(), faults == 0 ? std::numeric_limits<int>::max() : faults),
        model_(length) {
    Restart();
  }

  void Append(const ChunkInfo& info) {
    ASSERT_OK(store_->Append(ChunkOf(info)));
    model_.Append(info);
  }
  void Evict(const ChunkKey& key) {
    ASSERT_OK(store_->Evict({key}));
    model_.Evict(key);
  }
  // Forgets everything and reads the store again, which lists chunks by their keys.
  void Restart() {
    data_set_ = std::make_unique<DataSet>(&faulty_, limits_, length_, registry_);
    cursor_.clear();
  }
  // Until the log has no more news, those about evictions included.
  void CatchUp() {
    if (cursor_.empty()) model_.SortByKey();
    for (bool more = true; more;) {
      const std::string before = cursor_;
      const bool answered = data_set_->Step(cursor_, absl::ZeroDuration());
      // A cursor that was forgotten means that the log was too short.
      more = !answered || cursor_ != before || !data_set_->caught_up();
    }
    for (const ChunkKey& key : model_.OldestBeyond(limits_.max_rows, limits_.max_bytes)) model_.Evict(key);
  }

  DataSet& data_set() { return *data_set_; }
  const NaiveIndex& model() const { return model_; }

  void ExpectSame(std::mt19937_64& random) {
    ASSERT_NO_FATAL_FAILURE(ExpectSameTotals(data_set_->totals(), model_.Totals()));
    int64_t next = 0;
    std::vector<ChunkInfo> listed;
    for (const auto& episode : data_set_->Episodes(0, std::numeric_limits<int>::max(), std::nullopt, next)) {
      for (const ChunkInfo& info : episode) listed.push_back(info);
    }
    std::vector<ChunkInfo> expected;
    for (const auto& [key, info] : model_.chunks()) expected.push_back(info);
    ASSERT_EQ(listed, expected);
    ASSERT_EQ(next, 0);
    for (const int length : {length_, length_ + 2}) {
      NaiveIndex model(length);
      for (const auto& [key, info] : model_.chunks()) model.Append(info);
      const std::set<Start> starts = model.Starts();
      const std::vector<Sequence> drawn = data_set_->Sample(*MakeUniformSampler(), length, 10, random);
      ASSERT_EQ(drawn.size(), starts.empty() ? 0u : 10u);
      for (const Sequence& sequence : drawn) {
        ASSERT_TRUE(starts.contains({sequence.episode_id, sequence.first_row}));
        ASSERT_NO_FATAL_FAILURE(ExpectSound(sequence, model, length));
      }
    }
  }

 private:
  const int length_;
  const DataSet::Limits limits_;
  const std::unique_ptr<Store> store_;
  FaultStore faulty_;
  prometheus::Registry registry_;
  NaiveIndex model_;
  std::unique_ptr<DataSet> data_set_;
  std::string cursor_;
};

// Chunks of 3 rows on a grid, every fourth episode an evaluation.
ChunkInfo RandomChunk(std::mt19937_64& random) {
  const int64_t episode = 1 + static_cast<int64_t>(random() % 5), first = 3 * static_cast<int64_t>(random() % 6);
  return Info(episode, first, 3, episode == 4 ? EpisodeMode::kEvaluate : EpisodeMode::kTrain);
}

// Appends, evictions and restarts in any order, and at some moments everything is compared.
void PlayHistory(Followed& followed, std::mt19937_64& random, int steps) {
  for (int step = 0; step < steps; ++step) {
    const uint64_t choice = random() % 20;
    const ChunkInfo info = RandomChunk(random);
    if (choice < 13) {
      ASSERT_NO_FATAL_FAILURE(followed.Append(info));
    } else if (choice < 17) {
      ASSERT_NO_FATAL_FAILURE(followed.Evict(info.key));
    } else {
      if (choice == 19) followed.Restart();
      followed.CatchUp();
      ASSERT_NO_FATAL_FAILURE(followed.ExpectSame(random)) << "step " << step;
    }
  }
  followed.CatchUp();
  ASSERT_NO_FATAL_FAILURE(followed.ExpectSame(random)) << "at the end";
}

class DataSetTest : public ::testing::Test {
 protected:
  // Thousands of restarts and failures would each be a line.
  static void SetUpTestSuite() { ASSERT_OK(InitLogging("data_set_test", "off")); }
};

TEST_F(DataSetTest, AgreesWithANaiveModelOverManyHistories) {
  for (uint64_t seed = 1; seed <= 1000; ++seed) {
    std::mt19937_64 random(seed);
    Followed followed(1 + static_cast<int>(random() % 7), {kEverything, kEverything}, 100000, 0);
    ASSERT_NO_FATAL_FAILURE(PlayHistory(followed, random, 40)) << "seed " << seed;
  }
}

TEST_F(DataSetTest, AgreesWithANaiveModelWhenItIsLateAndTheStoreFails) {
  for (uint64_t seed = 1; seed <= 600; ++seed) {
    std::mt19937_64 random(seed);
    // With so short a log a reader that was away for a while has to begin again.
    const int change_log_length = 1 + static_cast<int>(random() % 12);
    Followed followed(3, {kEverything, kEverything}, change_log_length, 2 + static_cast<int>(random() % 4));
    ASSERT_NO_FATAL_FAILURE(PlayHistory(followed, random, 40)) << "seed " << seed;
  }
}

TEST_F(DataSetTest, EvictsTheOldestWhateverHappened) {
  for (uint64_t seed = 1; seed <= 600; ++seed) {
    std::mt19937_64 random(seed);
    const DataSet::Limits limits = {static_cast<int64_t>(3 + random() % 30), static_cast<int64_t>(30 + random() % 400)};
    Followed followed(2, limits, 100000, 0);
    ASSERT_NO_FATAL_FAILURE(PlayHistory(followed, random, 40)) << "seed " << seed;
    EXPECT_LE(followed.data_set().totals().rows, limits.max_rows);
    EXPECT_LE(followed.data_set().totals().bytes, limits.max_bytes);
  }
}

TEST_F(DataSetTest, StaysUniformAfterEvictionsAndARestart) {
  constexpr int kLength = 5, kDraws = 40'000;
  Followed followed(kLength, {kEverything, kEverything}, 100000, 0);
  std::mt19937_64 random(3);
  for (int i = 0; i < 100; ++i) {
    followed.Append(RandomChunk(random));
    if (i % 3 == 0) followed.Evict(RandomChunk(random).key);
    if (i % 10 == 0) followed.CatchUp();
  }
  for (const bool restart : {false, true}) {
    if (restart) followed.Restart();
    followed.CatchUp();
    std::map<Start, int> counts;
    for (const Start& start : followed.model().Starts()) counts[start] = 0;
    ASSERT_GT(counts.size(), 10u);
    const double expected = static_cast<double>(kDraws) / static_cast<double>(counts.size());
    const size_t starts = counts.size();
    for (const Sequence& sequence : followed.data_set().Sample(*MakeUniformSampler(), kLength, kDraws, random)) {
      ++counts[{sequence.episode_id, sequence.first_row}];
    }
    EXPECT_EQ(counts.size(), starts);
    ExpectProportional(counts, [&](const Start&) { return expected; });
  }
}

// The probabilities that a sampler by priority gives to what it draws, and what they must be.
void ExpectPrioritized(Followed& followed, const NaiveIndex& priorities, int length) {
  const std::map<Start, double> expected = priorities.WithLength(length).Prioritized(1, 0.1);
  const auto sampler = MakePrioritizedSampler(1, 0.1);
  ASSERT_OK(sampler);
  std::mt19937_64 random(1);
  std::set<Start> drawn;
  for (const Sequence& sequence : followed.data_set().Sample(**sampler, length, 5000, random)) {
    const Start start = {sequence.episode_id, sequence.first_row};
    ASSERT_NEAR(sequence.probability, expected.at(start), 1e-12) << start.first << " " << start.second << " length " << length;
    drawn.insert(start);
  }
  EXPECT_EQ(drawn.size(), expected.size());
}

TEST_F(DataSetTest, KeepsPrioritiesForEveryLengthUntilItReadsEverythingAnew) {
  Followed followed(3, {kEverything, kEverything}, 100000, 0);
  NaiveIndex model(3);
  const auto append = [&](int64_t episode, int64_t row) {
    followed.Append(Info(episode, row, 4));
    model.Append(Info(episode, row, 4));
    followed.CatchUp();
  };
  const std::vector<ChunkPriority> priorities = {{{1, 0}, 5}, {{7, 0}, 9}, {{2, 0}, 0.5}};
  for (const int64_t row : {0, 4}) {
    append(1, row);
    append(2, row);
  }
  ASSERT_NO_FATAL_FAILURE(ExpectPrioritized(followed, model, 3));
  EXPECT_EQ(followed.data_set().SetPriorities(priorities), 2);
  for (const ChunkPriority& priority : priorities) model.SetPriority(priority.key, priority.priority);
  // More lengths than indexes are kept; new chunks have 5.
  for (const int64_t row : {8, 12, 16}) {
    append(2, row);
    for (const int length : {3, 1, 2, 4, 5, 6, 7, 8, 1}) {
      ASSERT_NO_FATAL_FAILURE(ExpectPrioritized(followed, model, length)) << "row " << row;
    }
  }
  // For a chunk named twice the last one counts.
  EXPECT_EQ(followed.data_set().SetPriorities({{{1, 4}, 8}, {{1, 4}, 3}}), 2);
  model.SetPriority({1, 4}, 8);
  model.SetPriority({1, 4}, 3);
  append(1, 8);
  ASSERT_NO_FATAL_FAILURE(ExpectPrioritized(followed, model, 5));
  followed.Restart();
  followed.CatchUp();
  ASSERT_NO_FATAL_FAILURE(ExpectPrioritized(followed, followed.model(), 5));
}

TEST_F(DataSetTest, ListsEpisodesByPage) {
  Followed followed(2, {kEverything, kEverything}, 100000, 0);
  for (const int64_t episode : {2, 3, 5, 8}) {
    followed.Append(Info(episode, 0, 3, episode == 3 ? EpisodeMode::kEvaluate : EpisodeMode::kTrain));
    followed.Append(Info(episode, 3, 3, episode == 3 ? EpisodeMode::kEvaluate : EpisodeMode::kTrain));
  }
  followed.CatchUp();
  const auto list = [&](int64_t first, int max, std::optional<EpisodeMode> mode, int64_t& next) {
    std::vector<int64_t> ids;
    for (const auto& episode : followed.data_set().Episodes(first, max, mode, next)) {
      EXPECT_EQ(episode.size(), 2u);
      ids.push_back(episode[0].key.episode_id);
    }
    return ids;
  };
  using Ids = std::vector<int64_t>;
  int64_t next = -1;
  EXPECT_EQ(list(0, 2, std::nullopt, next), (Ids{2, 3}));
  EXPECT_EQ(next, 5);
  EXPECT_EQ(list(next, 2, std::nullopt, next), (Ids{5, 8}));
  EXPECT_EQ(next, 0);
  EXPECT_EQ(list(3, 2, EpisodeMode::kTrain, next), (Ids{5, 8}));
  EXPECT_EQ(list(0, 9, EpisodeMode::kEvaluate, next), (Ids{3}));
  EXPECT_EQ(list(9, 9, std::nullopt, next), Ids{});
  EXPECT_EQ(next, 0);
}

}  // namespace
}  // namespace orrery
