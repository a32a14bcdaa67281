#include "libs/learning/learner.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/learning/learning_testing.h"
#include "libs/world_model/snapshot.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kRows = 40;

// Grants updates until `owed` are reported, then says that the run is complete; remembers what it was told, in order.
class FakeReplay : public ReplayClient {
 public:
  FakeReplay(int64_t owed, int32_t block) : ReplayClient(nullptr, "test"), owed_(owed), block_(block) {}

  absl::StatusOr<int64_t> AcquireLearner(const std::string&, absl::Time) override {
    if (std::exchange(held_by_another, false)) return absl::AlreadyExistsError("held by learner-1");
    return generation;
  }
  absl::StatusOr<RunCoordinator::Grant> ReserveUpdates(int64_t learner_generation, int64_t done, int32_t wanted,
                                                       absl::Time) override {
    EXPECT_EQ(learner_generation, generation);
    if (outages > 0) {
      --outages;
      outage_seen.Notify();
      return absl::UnavailableError("away");
    }
    if (done >= fence_at) return absl::FailedPreconditionError("generation 1 is not the holder");
    if (events.empty() || events.back() != absl::StrCat("report ", done)) events.push_back(absl::StrCat("report ", done));
    RunCoordinator::Grant grant;
    grant.updates = static_cast<int32_t>(std::min<int64_t>({wanted, block_, owed_ - done}));
    grant.run_complete = done >= owed_;
    return grant;
  }
  absl::Status ReleaseLearner(int64_t learner_generation, int64_t done, absl::Time) override {
    EXPECT_EQ(learner_generation, generation);
    events.push_back(absl::StrCat("release ", done));
    return absl::OkStatus();
  }
  absl::Status PutSnapshot(const Store::Snapshot& put, absl::Time) override {
    events.push_back(absl::StrCat("put ", put.version.generation, ".", put.version.counter));
    snapshot = put;
    return absl::OkStatus();
  }
  absl::StatusOr<replay::v1::GetStatsResponse> GetStats(absl::Time) override {
    replay::v1::GetStatsResponse response;
    response.set_rows_appended(kRows);
    return response;
  }

  int64_t generation = 1;
  bool held_by_another = false;
  int outages = 0;  // at most 1
  absl::Notification outage_seen;
  int64_t fence_at = std::numeric_limits<int64_t>::max();
  std::vector<std::string> events;
  Store::Snapshot snapshot;

 private:
  const int64_t owed_;
  const int32_t block_;
};

class LearnerTest : public ::testing::Test {
 protected:
  LearnerTest() {
    torch::set_num_threads(1);  // these models are too small to be worth more
    experiment_.set_name("test");
    experiment_.mutable_environment()->set_task("point_pixels");
    *experiment_.mutable_model() = SmallModel(/*with_image=*/false);
    config::v1::Learning& learning = *experiment_.mutable_learning();
    learning.set_batch_size(3);
    learning.set_sequence_length(5);
    learning.set_checkpoint_every_updates(1000);
    for (int64_t episode = 1; episode <= 4; ++episode) data_.push_back(Appended(TestChunk(episode, 0, 10)));
    data_.push_back(CaughtUp());
  }

  Learner::Options Options(std::shared_ptr<FakeReplay> replay) {
    Learner::Options options;
    options.experiment = experiment_;
    options.learner_id = "learner-test";
    options.replay = std::move(replay);
    options.watcher = std::make_unique<FakeWatcher>(data_);
    options.publisher = &publisher_;
    options.registry = &registry_;
    return options;
  }

  double Metric(const std::string& name) {
    for (const prometheus::MetricFamily& family : registry_.Collect()) {
      if (family.name == name) return family.metric.at(0).counter.value + family.metric.at(0).gauge.value;
    }
    ADD_FAILURE() << "no metric " << name;
    return -1;
  }

  static TensorMap Parameters(const FakeReplay& replay) {
    const ModelSnapshot snapshot = ParseSnapshot(replay.snapshot.file).value();
    TensorMap parameters;
    for (const auto& parameter : snapshot.model->named_parameters()) parameters[parameter.key()] = parameter.value();
    return parameters;
  }

  static void ExpectSame(const TensorMap& a, const TensorMap& b) {
    ASSERT_EQ(a.size(), b.size());
    for (const auto& [name, tensor] : a) EXPECT_TRUE(torch::equal(tensor, b.at(name))) << name;
  }

  const TempDir dir_;
  config::v1::Experiment experiment_;
  std::vector<ChunkWatcher::Event> data_;
  SnapshotPublisher publisher_;
  prometheus::Registry registry_;
};

TEST_F(LearnerTest, AlternatePublishesEachBlockBeforeItIsReported) {
  auto replay = std::make_shared<FakeReplay>(6, 3);
  std::vector<int64_t> seen;
  Learner::Options options = Options(replay);
  options.on_update = [&](const Learner::UpdateReport& report) {
    EXPECT_FALSE(report.result.skipped);
    EXPECT_EQ(report.rows_appended, kRows);
    seen.push_back(report.updates);
  };
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options)));
  ASSERT_OK(learner->Run());
  EXPECT_THAT(replay->events,
              ElementsAre("put 1.0", "report 0", "put 1.3", "report 3", "put 1.6", "report 6", "release 6"));
  EXPECT_THAT(seen, ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_EQ(publisher_.version(), (SnapshotVersion{1, 6}));
  EXPECT_EQ(learner->progress().updates, 6);
  EXPECT_GT(learner->progress().loss, 0);
  EXPECT_EQ(Metric("orrery_learner_updates_total"), 6);
  EXPECT_EQ(Metric("orrery_learner_snapshot_version"), 6);
  EXPECT_DOUBLE_EQ(Metric("orrery_learner_updates_per_env_step"), 6.0 / kRows);
}

TEST_F(LearnerTest, ResumedLearningIsTheSameBitByBit) {
  auto straight = std::make_shared<FakeReplay>(8, 4);
  ASSERT_OK(Learner::Create(Options(straight)).value()->Run());

  const auto run = [&](int64_t owed) {
    auto replay = std::make_shared<FakeReplay>(owed, 4);
    Learner::Options options = Options(replay);
    options.checkpoint_dir = dir_.path();
    options.resume = true;
    EXPECT_OK(Learner::Create(std::move(options)).value()->Run());
    return replay;
  };
  run(4);
  const std::shared_ptr<FakeReplay> resumed = run(8);
  EXPECT_THAT(resumed->events, ElementsAre("put 1.4", "report 4", "put 1.8", "report 8", "release 8"));
  ExpectSame(Parameters(*straight), Parameters(*resumed));
}

TEST_F(LearnerTest, ABlockCutShortByStopIsMadeGoodAfterResume) {
  auto straight = std::make_shared<FakeReplay>(6, 6);
  ASSERT_OK(Learner::Create(Options(straight)).value()->Run());

  auto first = std::make_shared<FakeReplay>(6, 6);
  Learner::Options options = Options(first);
  options.checkpoint_dir = dir_.path();
  std::unique_ptr<Learner> learner;
  options.on_update = [&](const Learner::UpdateReport& report) {
    if (report.updates == 2) learner->Stop();
  };
  learner = Learner::Create(std::move(options)).value();
  ASSERT_OK(learner->Run());
  EXPECT_THAT(first->events, ElementsAre("put 1.0", "report 0", "release 0"));

  auto second = std::make_shared<FakeReplay>(6, 6);
  second->generation = 2;
  options = Options(second);
  options.checkpoint_dir = dir_.path();
  options.resume = true;
  ASSERT_OK(Learner::Create(std::move(options)).value()->Run());
  EXPECT_THAT(second->events, ElementsAre("put 2.2", "report 2", "put 2.6", "report 6", "release 6"));
  ExpectSame(Parameters(*straight), Parameters(*second));
}

TEST_F(LearnerTest, ConcurrentPublishesOnTheWayAndWaitsForNobody) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  experiment_.mutable_learning()->set_snapshot_every_updates(4);
  class Stuck : public SnapshotPublisher::Subscriber {
    void OnSnapshot(std::shared_ptr<const PublishedSnapshot>) override {}
    void OnClose() override {}
  } stuck;
  publisher_.Subscribe(&stuck, {});
  auto replay = std::make_shared<FakeReplay>(9, 9);
  std::vector<int64_t> published;
  Learner::Options options = Options(replay);
  options.on_snapshot = [&](SnapshotVersion version, const std::string&) { published.push_back(version.counter); };
  ASSERT_OK(Learner::Create(std::move(options)).value()->Run());
  EXPECT_THAT(published, ElementsAre(0, 4, 8, 9));
  EXPECT_EQ(replay->snapshot.version, (SnapshotVersion{1, 9}));
}

TEST_F(LearnerTest, StopsWhenFencedOff) {
  auto replay = std::make_shared<FakeReplay>(100, 3);
  replay->fence_at = 3;
  EXPECT_THAT(Learner::Create(Options(replay)).value()->Run(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("another learner took this run over")));
}

TEST_F(LearnerTest, WaitsForTheLeaseAndThroughAnOutage) {
  FakeClock clock;
  auto replay = std::make_shared<FakeReplay>(3, 3);
  replay->held_by_another = true;
  replay->outages = 1;
  Learner::Options options = Options(replay);
  options.clock = &clock;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options)));
  absl::Status status = absl::UnknownError("still running");
  std::thread thread([&] { status = learner->Run(); });
  clock.AwaitWaiters(1);  // for the lease
  clock.Advance(absl::Seconds(1));
  replay->outage_seen.WaitForNotification();
  clock.AwaitWaiters(1);  // for replay
  clock.Advance(absl::Seconds(1));
  thread.join();
  EXPECT_OK(status);
  EXPECT_THAT(replay->events, ElementsAre("put 1.0", "report 0", "put 1.3", "report 3", "release 3"));
}

TEST_F(LearnerTest, DoesNotBeginAnewOverCheckpointsOrWithThoseOfAnotherRun) {
  Learner::Options options = Options(std::make_shared<FakeReplay>(2, 2));
  options.checkpoint_dir = dir_.path();
  ASSERT_OK(Learner::Create(std::move(options)).value()->Run());

  options = Options(std::make_shared<FakeReplay>(2, 2));
  options.checkpoint_dir = dir_.path();
  EXPECT_THAT(Learner::Create(std::move(options)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("holds checkpoints")));

  experiment_.mutable_model()->set_deterministic_size(9);
  options = Options(std::make_shared<FakeReplay>(2, 2));
  options.checkpoint_dir = dir_.path();
  options.resume = true;
  EXPECT_THAT(Learner::Create(std::move(options)), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("param.")));

  experiment_.set_name("other");
  options = Options(std::make_shared<FakeReplay>(2, 2));
  options.checkpoint_dir = dir_.path();
  options.resume = true;
  EXPECT_THAT(Learner::Create(std::move(options)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("of the run \"test\"")));
}

TEST_F(LearnerTest, ACheckpointThatCannotBeWrittenDoesNotStopLearning) {
  experiment_.mutable_learning()->set_checkpoint_every_updates(1);
  Learner::Options options = Options(std::make_shared<FakeReplay>(3, 3));
  options.checkpoint_dir = dir_ / "gone";
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options)));
  std::filesystem::remove(dir_ / "gone");
  ASSERT_OK(learner->Run());
  EXPECT_EQ(learner->progress().updates, 3);
  EXPECT_EQ(Metric("orrery_learner_checkpoint_errors_total"), 4);  // after each update and at the end
}

TEST_F(LearnerTest, GoesBackToTheCheckpointWhenUpdatesStayNotFiniteAndGivesUpAtLast) {
  Learner::Options options = Options(std::make_shared<FakeReplay>(2, 2));
  options.checkpoint_dir = dir_.path();
  ASSERT_OK(Learner::Create(std::move(options)).value()->Run());

  // Rewards whose squares overflow.
  ArrayMap rows = TestRows(1, 0, kRows, /*with_image=*/false);
  for (float& reward : rows[kReward].mutable_as<float>()) reward = 1e30f;
  data_ = {Appended(MakeChunk(1, 0, kRows, rows)), CaughtUp()};
  options = Options(std::make_shared<FakeReplay>(1000, 1000));
  options.checkpoint_dir = dir_.path();
  options.resume = true;
  int skipped = 0;
  options.on_update = [&](const Learner::UpdateReport& report) { skipped += report.result.skipped; };
  EXPECT_THAT(Learner::Create(std::move(options)).value()->Run(),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("not finite")));
  EXPECT_EQ(skipped, 40);
  EXPECT_EQ(Metric("orrery_learner_skipped_updates_total"), 40);
}

TEST_F(LearnerTest, ABadChunkIsCountedAndLearningGoesOn) {
  Chunk damaged = TestChunk(9, 0, 10);
  damaged.payload.resize(damaged.payload.size() / 2);
  data_.insert(data_.begin(), Appended(std::move(damaged)));
  ASSERT_OK(Learner::Create(Options(std::make_shared<FakeReplay>(2, 2))).value()->Run());
  EXPECT_EQ(Metric("orrery_learner_chunks_refused_total"), 1);
}

TEST_F(LearnerTest, RefusesADataSetThatWouldNotFitTheMirror) {
  experiment_.mutable_replay()->set_max_rows(1000000000);
  EXPECT_THAT(Learner::Create(Options(std::make_shared<FakeReplay>(2, 2))),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("mirror_bytes")));
}

}  // namespace
}  // namespace orrery
