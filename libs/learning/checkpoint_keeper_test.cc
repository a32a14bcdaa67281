#include "libs/learning/checkpoint_keeper.h"

#include <filesystem>
#include <string>

#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class CheckpointKeeperTest : public ::testing::Test {
 protected:
  CheckpointKeeper Open(int64_t every_updates = 5) {
    CheckpointKeeper::Options options;
    options.folder = dir_.path();
    options.every_updates = every_updates;
    options.errors = &errors_;
    return CheckpointKeeper::Open(std::move(options)).value();
  }
  void Save(CheckpointKeeper& keeper, int64_t updates, const std::string& run = "run") {
    keeper.Save(updates, [&] {
      ++states_;
      Checkpoint checkpoint;
      checkpoint.updates = updates;
      checkpoint.experiment = "name: \"" + run + "\"";
      return checkpoint;
    });
  }
  // Counts skipped updates until learning has to go back.
  static int CountUntilReturn(CheckpointKeeper& keeper) {
    int counted = 1;
    while (!keeper.Count(/*skipped=*/true)) ++counted;
    return counted;
  }

  const TempDir dir_;
  prometheus::Counter errors_;
  int states_ = 0;
};

TEST_F(CheckpointKeeperTest, GoesBackAfterTenSkippedUpdatesInARow) {
  CheckpointKeeper keeper = Open();
  for (int i = 0; i < 9; ++i) EXPECT_FALSE(keeper.Count(true)) << i;
  EXPECT_EQ(keeper.skipped_in_a_row(), 9);
  EXPECT_FALSE(keeper.Count(false));
  EXPECT_EQ(keeper.skipped_in_a_row(), 0);
  EXPECT_EQ(CountUntilReturn(keeper), 10);
  EXPECT_EQ(keeper.skipped_in_a_row(), 0);
  EXPECT_EQ(CountUntilReturn(keeper), 10);
}

TEST_F(CheckpointKeeperTest, IsDueAtMultiplesUnlessUpdatesAreSkipped) {
  CheckpointKeeper keeper = Open(/*every_updates=*/3);
  EXPECT_FALSE(keeper.Due(2));
  EXPECT_TRUE(keeper.Due(3));
  EXPECT_FALSE(keeper.Due(4));
  keeper.Count(true);
  EXPECT_FALSE(keeper.Due(6));
  keeper.Count(false);
  EXPECT_TRUE(keeper.Due(9));
}

TEST_F(CheckpointKeeperTest, WritesTheSameStateOnce) {
  CheckpointKeeper keeper = Open();
  Save(keeper, 5);
  Save(keeper, 5);
  EXPECT_EQ(states_, 1);
  Save(keeper, 6);
  EXPECT_EQ(states_, 2);
  EXPECT_EQ(errors_.Value(), 0);
}

TEST_F(CheckpointKeeperTest, CountsWhatCannotBeWrittenAndTriesAgain) {
  CheckpointKeeper keeper = Open();
  std::filesystem::remove(dir_.path());
  Save(keeper, 5);
  EXPECT_EQ(errors_.Value(), 1);
  std::filesystem::create_directory(dir_.path());
  Save(keeper, 5);
  EXPECT_EQ(errors_.Value(), 1);
  ASSERT_OK_AND_ASSIGN(const Checkpoint newest, keeper.ToGoBackTo(7));
  EXPECT_EQ(newest.updates, 5);
}

TEST_F(CheckpointKeeperTest, GoesBackToTheNewestThatIsWhole) {
  CheckpointKeeper keeper = Open();
  Save(keeper, 5);
  Save(keeper, 10);
  ASSERT_OK_AND_ASSIGN(Checkpoint newest, keeper.ToGoBackTo(27));
  EXPECT_EQ(newest.updates, 10);
  ASSERT_OK(WriteFileAtomically(dir_ / "checkpoint-000000000010.safetensors", "damaged"));
  ASSERT_OK_AND_ASSIGN(newest, keeper.ToGoBackTo(37));
  EXPECT_EQ(newest.updates, 5);
  ASSERT_OK(WriteFileAtomically(dir_ / "checkpoint-000000000005.safetensors", "damaged"));
  EXPECT_THAT(keeper.ToGoBackTo(47),
              StatusIs(absl::StatusCode::kInternal,
                       AllOf(HasSubstr("10 updates in a row were not finite (updates 47)"),
                             HasSubstr("none of the 2 checkpoints in " + dir_.path()))));
}

// The newest may have been written when the parameters were spoilt already.
TEST_F(CheckpointKeeperTest, GoesBackOneFurtherWhenNothingCouldBeLearnt) {
  CheckpointKeeper keeper = Open();
  const auto go_back = [&](int64_t updates) { return keeper.ToGoBackTo(updates).value().updates; };
  Save(keeper, 5);
  Save(keeper, 10);
  keeper.Count(false);
  EXPECT_EQ(go_back(20), 10);
  Save(keeper, 21);
  EXPECT_EQ(states_, 2) << "the same as at 10";
  EXPECT_EQ(go_back(30), 5);
  keeper.Count(false);
  EXPECT_EQ(go_back(40), 10) << "something was learnt";
  keeper.Count(false);
  Save(keeper, 41);
  EXPECT_EQ(go_back(50), 41);
}

TEST_F(CheckpointKeeperTest, DoesNotBeginAnewWhereNoCheckpointCanBeUsed) {
  CheckpointKeeper keeper = Open();
  Save(keeper, 5);
  ASSERT_OK(WriteFileAtomically(dir_ / "checkpoint-000000000005.safetensors", "damaged"));
  for (int start = 0; start < 2; ++start) {
    EXPECT_THAT(Open().ToResume("run", /*resume=*/true),
                StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("none of the 1 checkpoints in " + dir_.path())));
  }
}

TEST_F(CheckpointKeeperTest, GivesUpWhenNothingIsLearntBetweenReturns) {
  CheckpointKeeper keeper = Open();
  Save(keeper, 5);
  for (int i = 1; i <= 3; ++i) {
    CountUntilReturn(keeper);
    ASSERT_OK(keeper.ToGoBackTo(10 * i));
    Save(keeper, 10 * i);  // what was gone back to: no progress
  }
  CountUntilReturn(keeper);
  EXPECT_THAT(keeper.ToGoBackTo(40), StatusIs(absl::StatusCode::kInternal, HasSubstr("lower learning.learning_rate")));
}

TEST_F(CheckpointKeeperTest, BeginsToCountReturnsAnewWhenSomethingLearntIsSaved) {
  CheckpointKeeper keeper = Open();
  Save(keeper, 5);
  for (int i = 1; i <= 8; ++i) {
    CountUntilReturn(keeper);
    ASSERT_OK(keeper.ToGoBackTo(20 * i)) << i;
    keeper.Count(false);
    if (i % 3 == 0) Save(keeper, 20 * i + 1);
  }
}

TEST_F(CheckpointKeeperTest, HasNothingToGoBackToWithoutAFolder) {
  ASSERT_OK_AND_ASSIGN(CheckpointKeeper keeper, CheckpointKeeper::Open({}));
  Save(keeper, 5);
  EXPECT_EQ(states_, 0);
  ASSERT_OK_AND_ASSIGN(const std::optional<Checkpoint> checkpoint, keeper.ToResume("run", /*resume=*/true));
  EXPECT_FALSE(checkpoint.has_value());
  EXPECT_EQ(CountUntilReturn(keeper), 10);
  EXPECT_THAT(keeper.ToGoBackTo(10), StatusIs(absl::StatusCode::kInternal, HasSubstr("there are no checkpoints")));
}

TEST_F(CheckpointKeeperTest, ResumesFromTheNewestOfTheSameRun) {
  CheckpointKeeper first = Open();
  ASSERT_OK_AND_ASSIGN(std::optional<Checkpoint> checkpoint, first.ToResume("run", /*resume=*/false));
  EXPECT_FALSE(checkpoint.has_value());
  ASSERT_OK_AND_ASSIGN(checkpoint, first.ToResume("run", /*resume=*/true));
  EXPECT_FALSE(checkpoint.has_value());
  Save(first, 5);
  CheckpointKeeper second = Open();
  EXPECT_THAT(second.ToResume("run", /*resume=*/false),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("holds checkpoints")));
  EXPECT_THAT(second.ToResume("other", /*resume=*/true),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("of the run \"run\", not \"other\"")));
  ASSERT_OK_AND_ASSIGN(checkpoint, second.ToResume("run", /*resume=*/true));
  ASSERT_TRUE(checkpoint.has_value());
  EXPECT_EQ(checkpoint->updates, 5);
  Save(second, 5);
  EXPECT_EQ(states_, 1) << "it is there";
}

}  // namespace
}  // namespace orrery
