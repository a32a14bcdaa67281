#include "libs/learning/snapshot_keeper.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;

// Waits in every call until it is let through.
class SlowReplay : public ReplayClient {
 public:
  SlowReplay() : ReplayClient(nullptr, "test") {}

  absl::Status PutSnapshot(const Store::Snapshot& snapshot, absl::Time) override {
    absl::MutexLock lock(&mu_);
    ++begun_;
    const auto may_end = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return let_through_ > 0; };
    mu_.Await(absl::Condition(&may_end));
    --let_through_;
    if (failures_ > 0) {
      --failures_;
      return absl::UnavailableError("away");
    }
    written_.push_back(snapshot.version.counter);
    return absl::OkStatus();
  }

  void AwaitCalls(int calls) {
    absl::MutexLock lock(&mu_);
    const auto begun = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return begun_ >= calls; };
    mu_.Await(absl::Condition(&begun));
  }
  void LetThrough(int calls) {
    absl::MutexLock lock(&mu_);
    let_through_ += calls;
  }
  void Fail(int calls) {
    absl::MutexLock lock(&mu_);
    failures_ = calls;
  }
  std::vector<int64_t> written() {
    absl::MutexLock lock(&mu_);
    return written_;
  }

 private:
  absl::Mutex mu_;
  int begun_ ABSL_GUARDED_BY(mu_) = 0;
  int let_through_ ABSL_GUARDED_BY(mu_) = 0;
  int failures_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<int64_t> written_ ABSL_GUARDED_BY(mu_);
};

class SnapshotKeeperTest : public ::testing::Test {
 protected:
  static Store::Snapshot Snapshot(int64_t counter) { return {{1, counter}, "file"}; }

  const std::shared_ptr<SlowReplay> replay_ = std::make_shared<SlowReplay>();
  prometheus::Counter errors_;
  SnapshotKeeper keeper_{replay_, absl::Seconds(5), &errors_};
};

TEST_F(SnapshotKeeperTest, WritesTheNewestOfThoseThatCameMeanwhile) {
  keeper_.Put(Snapshot(1));
  replay_->AwaitCalls(1);
  keeper_.Put(Snapshot(2));  // returns though the first one is being written
  keeper_.Put(Snapshot(3));
  replay_->LetThrough(2);
  EXPECT_OK(keeper_.Flush());
  EXPECT_THAT(replay_->written(), ElementsAre(1, 3));
  EXPECT_EQ(errors_.Value(), 0);
}

TEST_F(SnapshotKeeperTest, TriesTheLastOneAgainWhenFlushed) {
  replay_->Fail(1);
  replay_->LetThrough(2);
  keeper_.Put(Snapshot(1));
  EXPECT_OK(keeper_.Flush());
  EXPECT_THAT(replay_->written(), ElementsAre(1));
  EXPECT_EQ(errors_.Value(), 1);
}

TEST_F(SnapshotKeeperTest, SaysThatTheLastOneIsNotKept) {
  replay_->Fail(2);
  replay_->LetThrough(2);
  keeper_.Put(Snapshot(1));
  EXPECT_THAT(keeper_.Flush(), StatusIs(absl::StatusCode::kUnavailable, "away"));
  EXPECT_THAT(replay_->written(), ElementsAre());
  EXPECT_EQ(errors_.Value(), 2);
  replay_->LetThrough(1);
  keeper_.Put(Snapshot(2));
  EXPECT_OK(keeper_.Flush());
  EXPECT_THAT(replay_->written(), ElementsAre(2));
}

TEST_F(SnapshotKeeperTest, HasNothingToFlushAtFirst) { EXPECT_OK(keeper_.Flush()); }

}  // namespace
}  // namespace orrery
