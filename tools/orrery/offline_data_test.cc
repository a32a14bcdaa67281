#include "tools/orrery/offline_data.h"

#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/envs/environment.h"
#include "libs/envs/tasks.h"
#include "libs/learning/learning_testing.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kLength = 5;

class OfflineDataTest : public ::testing::Test {
 protected:
  OfflineDataTest() {
    options_.experiment.set_name("test");
    options_.experiment.mutable_environment()->set_task("task of elsewhere");
    *options_.experiment.mutable_model() = SmallModel(/*with_image=*/false);
    options_.experiment.mutable_learning()->set_sequence_length(kLength);
    options_.location = "file:" + dir_.path();
    options_.data_set = "stored";
  }
  void Save(const std::vector<Chunk>& chunks) {
    const auto store = OpenStore({.location = options_.location, .run = options_.data_set});
    ASSERT_OK(store);
    for (const Chunk& chunk : chunks) ASSERT_OK((*store)->Append(chunk));
  }
  auto Refuses(absl::StatusCode code, const std::string& message) {
    return StatusIs(code, AllOf(HasSubstr("data set \"stored\""), HasSubstr(message)));
  }

  const TempDir dir_;
  OfflineData::Options options_;
};

TEST_F(OfflineDataTest, ShowsEveryTrainingChunkOnceAndThenNothing) {
  Chunk evaluation = TestChunk(3, 0, 10);
  evaluation.info.mode = EpisodeMode::kEvaluate;
  std::vector<Chunk> chunks = {evaluation};
  for (int64_t episode = 10; episode < 60; ++episode) chunks.push_back(TestChunk(episode, 0, 6));
  Save(chunks);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<OfflineData> data, OfflineData::Open(options_));
  EXPECT_EQ(data->rows(), 300);
  for (int twice = 0; twice < 2; ++twice) {
    const std::unique_ptr<ChunkWatcher> watcher = data->MakeWatcher();
    std::set<int64_t> seen;
    while (true) {
      ASSERT_OK_AND_ASSIGN(const ChunkWatcher::Event event, watcher->Next(absl::InfiniteFuture()));
      if (event.caught_up) break;
      ASSERT_TRUE(event.appended.has_value());
      EXPECT_EQ(event.appended->payload, TestChunk(event.appended->info.key.episode_id, 0, 6).payload);
      EXPECT_TRUE(seen.insert(event.appended->info.key.episode_id).second);
    }
    EXPECT_EQ(seen.size(), 50u);
    EXPECT_THAT(watcher->Next(absl::Now()), StatusIs(absl::StatusCode::kDeadlineExceeded));
    watcher->Close();
    EXPECT_THAT(watcher->Next(absl::InfiniteFuture()), StatusIs(absl::StatusCode::kCancelled));
  }
}

TEST_F(OfflineDataTest, GrantsWhatIsAskedForAndKeepsNothing) {
  Save({TestChunk(1, 0, 10)});
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<OfflineData> data, OfflineData::Open(options_));
  const std::shared_ptr<ReplayClient> replay = data->MakeReplay();
  EXPECT_THAT(replay->AcquireLearner("learner", absl::Now()), IsOkAndHolds(1));
  ASSERT_OK_AND_ASSIGN(const RunCoordinator::Grant grant, replay->ReserveUpdates(1, 0, 17, absl::Now()));
  EXPECT_EQ(grant.updates, 17);
  EXPECT_FALSE(grant.run_complete);
  EXPECT_OK(replay->PutSnapshot({{1, 1}, "file"}, absl::Now()));
  ASSERT_OK_AND_ASSIGN(const replay::v1::GetStatsResponse stats, replay->GetStats(absl::Now()));
  EXPECT_EQ(stats.rows_appended(), 10);
}

TEST_F(OfflineDataTest, ADataSetThatIsNotThereIsNotMade) {
  Save({TestChunk(1, 0, 10)});
  options_.data_set = "another";
  EXPECT_THAT(OfflineData::Open(options_), StatusIs(absl::StatusCode::kNotFound, AllOf(HasSubstr("data set \"another\" is not"),
                                                                                       HasSubstr("it has \"stored\""))));
  EXPECT_FALSE(std::filesystem::exists(dir_ / "another"));
  options_.location = "file:" + dir_.path() + "/nowhere";
  EXPECT_THAT(OfflineData::Open(options_), StatusIs(absl::StatusCode::kNotFound, HasSubstr("nowhere")));
}

TEST_F(OfflineDataTest, RefusesWhatNothingCanBeLearntFrom) {
  Save({});
  EXPECT_THAT(OfflineData::Open(options_), Refuses(absl::StatusCode::kFailedPrecondition, "no rows are stored"));
  Save({TestChunk(1, 0, 4), TestChunk(2, 0, 4)});
  EXPECT_THAT(OfflineData::Open(options_),
              Refuses(absl::StatusCode::kFailedPrecondition,
                      "none of its 2 episodes has as many rows as learning.sequence_length, 5"));
  Save({TestChunk(3, 0, 5)});
  EXPECT_OK(OfflineData::Open(options_));
}

TEST_F(OfflineDataTest, RefusesRowsOfAnotherSpecification) {
  Save({TestChunk(1, 0, 10)});
  options_.experiment.mutable_model()->mutable_modalities(0)->mutable_vector()->set_size(kTestVector + 1);
  EXPECT_THAT(OfflineData::Open(options_),
              Refuses(absl::StatusCode::kFailedPrecondition, "\"joints\" is float32 [10, 3], the model expects float32 [10, 4]"));
  // Fields fit, but they were made by another environment than the one that will be played.
  options_.experiment.mutable_model()->mutable_modalities(0)->mutable_vector()->set_size(kTestVector);
  options_.experiment.mutable_environment()->set_task("point_pixels");
  EXPECT_THAT(OfflineData::Open(options_),
              Refuses(absl::StatusCode::kFailedPrecondition, "the specification hash of episode 1 is 0000000000000000"));
  Chunk chunk = TestChunk(1, 0, 10);
  const EnvironmentOptions played = TaskOptions(options_.experiment.environment()).value()[0];
  chunk.info.specification_hash = Hash(MakeEnvironment(played).value()->spec());
  ASSERT_OK(DeleteDataSet({.location = options_.location, .run = "stored"}));
  Save({chunk});
  EXPECT_OK(OfflineData::Open(options_));
}

TEST_F(OfflineDataTest, RefusesMoreThanTheMirrorHolds) {
  Chunk chunk = TestChunk(1, 0, 1000, /*with_image=*/true);
  Save({chunk});
  *options_.experiment.mutable_model() = SmallModel(/*with_image=*/true);
  EXPECT_OK(OfflineData::Open(options_));
  options_.experiment.mutable_learning()->set_mirror_bytes(1 << 20);
  EXPECT_THAT(OfflineData::Open(options_), Refuses(absl::StatusCode::kResourceExhausted, "learning.mirror_bytes 1048576"));
}

}  // namespace
}  // namespace orrery
