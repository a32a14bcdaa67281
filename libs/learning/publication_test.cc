#include "libs/learning/publication.h"

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "libs/base/status_matchers.h"
#include "libs/learning/learning_testing.h"
#include "libs/world_model/snapshot.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;

constexpr double kEverySeconds = 2.5;

// Takes snapshots unless it is away.
class FakeReplay : public ReplayClient {
 public:
  FakeReplay() : ReplayClient(nullptr, "test") {}
  absl::Status PutSnapshot(const Store::Snapshot& snapshot, absl::Time) override {
    absl::MutexLock lock(&mu_);
    if (away_) return absl::UnavailableError("away");
    kept_.push_back(snapshot);
    return absl::OkStatus();
  }
  void GoAway() {
    absl::MutexLock lock(&mu_);
    away_ = true;
  }
  std::vector<Store::Snapshot> kept() {
    absl::MutexLock lock(&mu_);
    return kept_;
  }

 private:
  absl::Mutex mu_;
  bool away_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<Store::Snapshot> kept_ ABSL_GUARDED_BY(mu_);
};

class Planner : public SnapshotPublisher::Subscriber {
 public:
  void OnSnapshot(std::shared_ptr<const PublishedSnapshot> snapshot) override { got.push_back(snapshot->version); }
  void OnClose() override {}
  std::vector<SnapshotVersion> got;
};

class PublicationTest : public ::testing::Test {
 protected:
  PublicationTest() : model_(WorldModel::Create(SmallModel(/*with_image=*/false), 1).value()) {}

  std::unique_ptr<Publication> Make(config::v1::Learning::Schedule schedule) {
    Publication::Options options;
    options.experiment.set_name("test");
    *options.experiment.mutable_model() = model_->config();
    config::v1::Learning& learning = *options.experiment.mutable_learning();
    learning.set_schedule(schedule);
    learning.set_snapshot_every_updates(4);
    learning.set_snapshot_every_seconds(kEverySeconds);
    options.replay = replay_;
    options.on_snapshot = [this](SnapshotVersion version, const std::string&) {
      clock_.Advance(snapshot_takes_);
      seen_.push_back(version.counter);
    };
    options.publisher = &publisher_;
    options.version = &version_;
    options.seconds = &seconds_;
    options.put_errors = &put_errors_;
    options.clock = &clock_;
    return std::make_unique<Publication>(std::move(options));
  }

  const std::shared_ptr<WorldModel> model_;
  const std::shared_ptr<FakeReplay> replay_ = std::make_shared<FakeReplay>();
  FakeClock clock_{absl::FromUnixSeconds(1000)};
  SnapshotPublisher publisher_{&clock_};
  prometheus::Gauge version_;
  prometheus::Histogram seconds_{prometheus::Histogram::BucketBoundaries{1}};
  prometheus::Counter put_errors_;
  std::vector<int64_t> seen_;
  absl::Duration snapshot_takes_ = absl::ZeroDuration();
};

TEST_F(PublicationTest, AlternateKeepsEachSnapshotAtOnce) {
  Planner planner;
  publisher_.Subscribe(&planner, {});
  const auto publication = Make(config::v1::Learning::ALTERNATE);
  publication->Publish(*model_, {2, 3}, /*always_keep=*/true);
  ASSERT_EQ(replay_->kept().size(), 1u);
  const Store::Snapshot kept = replay_->kept()[0];
  EXPECT_EQ(kept.version, (SnapshotVersion{2, 3}));
  ASSERT_OK_AND_ASSIGN(const ModelSnapshot snapshot, ParseSnapshot(kept.file));
  EXPECT_EQ(snapshot.info.run, "test");
  EXPECT_EQ(snapshot.info.generation, 2);
  EXPECT_EQ(snapshot.info.counter, 3);
  for (const auto& parameter : model_->named_parameters()) {
    EXPECT_TRUE(torch::equal(*snapshot.model->named_parameters().find(parameter.key()), parameter.value())) << parameter.key();
  }
  EXPECT_THAT(planner.got, ElementsAre(SnapshotVersion{2, 3}));
  EXPECT_THAT(seen_, ElementsAre(3));
  EXPECT_EQ(version_.Value(), 3);
  EXPECT_EQ(seconds_.Collect().histogram.sample_count, 1u);
  clock_.Advance(absl::Hours(1));
  EXPECT_FALSE(publication->Due(4)) << "blocks say when";
  publisher_.Unsubscribe(&planner);
}

TEST_F(PublicationTest, ConcurrentIsDueAfterUpdatesOrSeconds) {
  const auto publication = Make(config::v1::Learning::CONCURRENT);
  publication->Publish(*model_, {1, 0}, true);
  EXPECT_FALSE(publication->Due(0)) << "it is published";
  EXPECT_FALSE(publication->Due(3));
  EXPECT_TRUE(publication->Due(4));
  publication->Publish(*model_, {1, 4}, false);
  EXPECT_FALSE(publication->Due(4));
  clock_.Advance(absl::Seconds(kEverySeconds) - absl::Nanoseconds(1));
  EXPECT_FALSE(publication->Due(5));
  clock_.Advance(absl::Nanoseconds(1));
  EXPECT_TRUE(publication->Due(5));
  EXPECT_FALSE(publication->Due(4)) << "there is nothing new";
}

TEST_F(PublicationTest, ConcurrentHandsReplayOneEveryFiveSeconds) {
  const auto publication = Make(config::v1::Learning::CONCURRENT);
  const auto publish = [&](int64_t updates, bool always_keep) {
    publication->Publish(*model_, {1, updates}, always_keep);
    publication->Flush();
  };
  publish(1, false);
  clock_.Advance(absl::Seconds(5) - absl::Nanoseconds(1));
  publish(2, false);
  clock_.Advance(absl::Nanoseconds(1));
  publish(3, false);
  publish(4, false);
  publish(5, true);
  std::vector<int64_t> kept;
  for (const Store::Snapshot& snapshot : replay_->kept()) kept.push_back(snapshot.version.counter);
  EXPECT_THAT(kept, ElementsAre(1, 3, 5));
  EXPECT_THAT(seen_, ElementsAre(1, 2, 3, 4, 5));
}

TEST_F(PublicationTest, FiveSecondsAreCountedFromTheBeginningOfASnapshot) {
  snapshot_takes_ = absl::Milliseconds(100);
  const auto publication = Make(config::v1::Learning::CONCURRENT);
  const absl::Time begin = clock_.Now();
  publication->Publish(*model_, {1, 1}, /*always_keep=*/false);
  publication->Flush();
  clock_.Advance(begin + absl::Seconds(5) - clock_.Now());
  publication->Publish(*model_, {1, 2}, /*always_keep=*/false);
  publication->Flush();
  EXPECT_EQ(replay_->kept().size(), 2u);
}

TEST_F(PublicationTest, CountsWhatReplayDoesNotTake) {
  replay_->GoAway();
  Make(config::v1::Learning::ALTERNATE)->Publish(*model_, {1, 1}, true);
  EXPECT_EQ(put_errors_.Value(), 1);
  EXPECT_EQ(publisher_.version(), (SnapshotVersion{1, 1})) << "planners get it all the same";
  const auto publication = Make(config::v1::Learning::CONCURRENT);
  publication->Publish(*model_, {1, 2}, true);
  publication->Flush();
  EXPECT_EQ(put_errors_.Value(), 3) << "Flush tried once more";
}

TEST_F(PublicationTest, AwaitsPlannersUnderAlternateForTenSecondsAtMost) {
  Planner planner;
  publisher_.Subscribe(&planner, {});
  const auto never = [] { return false; };
  Make(config::v1::Learning::CONCURRENT)->AwaitPlanners(never);  // returns at once
  const auto publication = Make(config::v1::Learning::ALTERNATE);
  publication->Publish(*model_, {1, 7}, true);
  std::thread served([&] { publication->AwaitPlanners(never); });
  clock_.AwaitWaiters(1);
  publisher_.Acknowledge(&planner, {1, 7});
  served.join();
  EXPECT_EQ(clock_.Now(), absl::FromUnixSeconds(1000)) << "it waited for the planner alone";

  publication->Publish(*model_, {1, 8}, true);
  std::thread patient([&] { publication->AwaitPlanners(never); });
  clock_.AwaitWaiters(1);
  clock_.Advance(absl::Seconds(10));
  patient.join();
  publication->AwaitPlanners([] { return true; });  // returns at once

  // One that refuses what it gets costs that time once, not at every block.
  publication->Publish(*model_, {1, 9}, true);
  publication->AwaitPlanners(never);
  publisher_.Acknowledge(&planner, {1, 7});
  publication->AwaitPlanners(never);
  publisher_.Acknowledge(&planner, {1, 9});
  publication->Publish(*model_, {1, 10}, true);
  std::thread again([&] { publication->AwaitPlanners(never); });
  clock_.AwaitWaiters(1);
  publisher_.Acknowledge(&planner, {1, 10});
  again.join();
  publisher_.Unsubscribe(&planner);
}

}  // namespace
}  // namespace orrery
