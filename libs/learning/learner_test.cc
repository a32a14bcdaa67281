#include "libs/learning/learner.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/learning/learning_testing.h"
#include "libs/replay/testing/child_process.h"
#include "libs/world_model/snapshot.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kRows = 40;

// Grants updates until `owed` are reported, then says that the run is complete; remembers what it was told, in order. Snapshots
// may come from another thread; what they leave is read when the learner has ended.
class FakeReplay : public ReplayClient {
 public:
  FakeReplay(int64_t owed, int32_t block) : ReplayClient(nullptr, "test"), owed_(owed), block_(block) {}

  absl::StatusOr<int64_t> AcquireLearner(const std::string&, absl::Time) override {
    const absl::Status refused = std::exchange(refusal, absl::OkStatus());
    if (refused.ok()) return generation;
    if (while_refused) while_refused();
    return refused;
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
    absl::MutexLock lock(&mu_);
    if (events.empty() || events.back() != absl::StrCat("report ", done)) events.push_back(absl::StrCat("report ", done));
    RunCoordinator::Grant grant;
    grant.updates = static_cast<int32_t>(std::min<int64_t>({wanted, block_, owed_ - done}));
    grant.run_complete = done >= owed_;
    return grant;
  }
  absl::Status ReleaseLearner(int64_t learner_generation, int64_t done, absl::Time) override {
    EXPECT_EQ(learner_generation, generation);
    absl::MutexLock lock(&mu_);
    events.push_back(absl::StrCat("release ", done));
    return absl::OkStatus();
  }
  absl::Status PutSnapshot(const Store::Snapshot& put, absl::Time) override {
    absl::MutexLock lock(&mu_);
    if (failed_puts > 0) {
      --failed_puts;
      return absl::UnavailableError("away");
    }
    events.push_back(absl::StrCat("put ", put.version.generation, ".", put.version.counter));
    snapshot = put;
    return absl::OkStatus();
  }
  absl::StatusOr<replay::v1::GetStatsResponse> GetStats(absl::Time) override {
    if (!stats_asked.HasBeenNotified()) stats_asked.Notify();
    replay::v1::GetStatsResponse response;
    response.set_rows_appended(rows);
    return response;
  }

  int64_t generation = 1;
  absl::Status refusal;  // of the first who wants to become the learner
  std::function<void()> while_refused;
  int64_t rows = kRows;
  absl::Notification stats_asked;
  int outages = 0;  // at most 1
  absl::Notification outage_seen;
  int failed_puts = 0;
  int64_t fence_at = std::numeric_limits<int64_t>::max();
  std::vector<std::string> events;
  Store::Snapshot snapshot;

 private:
  const int64_t owed_;
  const int32_t block_;
  absl::Mutex mu_;  // of events and snapshot
};

constexpr int32_t kBlock = 4;

// Under ALTERNATE: an episode is stored whenever a block is reported, so what is learnt from depends on how far the learner is.
class AlternatingReplay : public FakeReplay {
 public:
  // `stored` updates were reported before.
  AlternatingReplay(int64_t owed, int64_t stored, std::vector<FakeWatcher*> watchers)
      : FakeReplay(owed, kBlock), watchers_(std::move(watchers)) {
    rows = 0;
    Store(stored);
    for (FakeWatcher* const watcher : watchers_) watcher->Push(CaughtUp());
  }
  absl::StatusOr<RunCoordinator::Grant> ReserveUpdates(int64_t learner_generation, int64_t done, int32_t wanted,
                                                       absl::Time deadline) override {
    Store(done);
    absl::StatusOr<RunCoordinator::Grant> grant = FakeReplay::ReserveUpdates(learner_generation, done, wanted, deadline);
    if (grant.ok()) grant->updates = std::min(grant->updates, kBlock - static_cast<int32_t>(done % kBlock));
    return grant;
  }

 private:
  void Store(int64_t done) {
    for (; rows < 10 * (2 + done / kBlock); rows += 10) {
      for (FakeWatcher* const watcher : watchers_) watcher->Push(Appended(TestChunk(1 + rows / 10, 0, 10)));
    }
  }

  const std::vector<FakeWatcher*> watchers_;
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
    options.planner_patience = absl::ZeroDuration();  // there are no planners
    return options;
  }

  // With a data set that grows as `replay` is told.
  Learner::Options Alternating(int64_t owed, int64_t stored, std::shared_ptr<FakeReplay>& replay) {
    auto watcher = std::make_unique<FakeWatcher>();
    replay = std::make_shared<AlternatingReplay>(owed, stored, std::vector{watcher.get()});
    Learner::Options options = Options(replay);
    options.watcher = std::move(watcher);
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

// The thread that learns is not the one that set the number of threads.
TEST_F(LearnerTest, UsesTheThreadsOfLibTorchThatWereSet) {
  torch::set_num_threads(5);
  int threads = 0;
  Learner::Options options = Options(std::make_shared<FakeReplay>(2, 1));
  options.on_update = [&](const Learner::UpdateReport&) { threads = OpenMpThreads(); };
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options)));
  std::thread([&] { EXPECT_OK(learner->Run()); }).join();
  torch::set_num_threads(1);
  EXPECT_EQ(threads, 5);
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

// Runs the next test in a process of its own, whose end it gives as waitpid does.
int RunUntilKilled(const std::string& folder, const std::string& kill_at, int every) {
  const std::string program = std::filesystem::read_symlink("/proc/self/exe");
  return std::system(absl::StrCat("LEARNER_TEST_FOLDER='", folder, "' LEARNER_TEST_KILL_AT='", kill_at,
                                  "' LEARNER_TEST_EVERY=", every, " exec '", program,
                                  "' --gtest_also_run_disabled_tests --gtest_filter=*.DISABLED_IsKilled >/dev/null 2>&1")
                         .c_str());
}

// Ends by SIGKILL at the moment that its variables name: "update 5", "snapshot 8".
TEST_F(LearnerTest, DISABLED_IsKilled) {
  const char *folder = std::getenv("LEARNER_TEST_FOLDER"), *kill_at = std::getenv("LEARNER_TEST_KILL_AT"),
             *every = std::getenv("LEARNER_TEST_EVERY");
  if (folder == nullptr || kill_at == nullptr || every == nullptr) GTEST_SKIP() << "is run by the test after it";
  experiment_.mutable_learning()->set_checkpoint_every_updates(std::atoi(every));
  std::shared_ptr<FakeReplay> replay;
  Learner::Options options = Alternating(100, 0, replay);
  options.checkpoint_dir = folder;
  const auto reached = [&](const std::string& moment) {
    if (moment == kill_at) kill(getpid(), SIGKILL);
  };
  options.on_update = [&](const Learner::UpdateReport& report) { reached(absl::StrCat("update ", report.updates)); };
  options.on_snapshot = [&](SnapshotVersion version, const std::string&) {
    reached(absl::StrCat("snapshot ", version.counter));
  };
  FAIL() << "was not killed: " << Learner::Create(std::move(options)).value()->Run();
}

TEST_F(LearnerTest, KilledAtAnyMomentItComesToTheSameParameters) {
  std::shared_ptr<FakeReplay> straight;
  ASSERT_OK(Learner::Create(Alternating(16, 0, straight)).value()->Run());
  struct Case {
    const char* kill_at;
    int64_t stored;  // updates that were reported until then
    int64_t resumes_at;
    int every;  // checkpoint_every_updates
  };
  for (const Case& c : {Case{"update 2", 0, 0, 1000},       // nothing was saved yet
                        Case{"update 4", 0, 0, 1000},       // the last one of a block, which is not saved yet
                        Case{"update 5", 4, 4, 1000},       // the next episode is there
                        Case{"snapshot 8", 4, 8, 1000},     // saved, not reported
                        Case{"update 11", 8, 10, 5}}) {     // inside a block, after a checkpoint inside it
    experiment_.mutable_learning()->set_checkpoint_every_updates(c.every);
    const std::string folder = absl::StrCat(dir_.path(), "/", c.kill_at);
    const int status = RunUntilKilled(folder, c.kill_at, c.every);
    ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << c.kill_at << " " << status;
    std::shared_ptr<FakeReplay> resumed;
    Learner::Options options = Alternating(16, c.stored, resumed);
    options.checkpoint_dir = folder;
    options.resume = true;
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options)));
    EXPECT_EQ(learner->progress().updates, c.resumes_at) << c.kill_at;
    ASSERT_OK(learner->Run());
    EXPECT_EQ(resumed->snapshot.version, (SnapshotVersion{1, 16}));
    ExpectSame(Parameters(*straight), Parameters(*resumed));
  }
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

TEST_F(LearnerTest, ConcurrentKeepsTheLastSnapshotForCertain) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  auto replay = std::make_shared<FakeReplay>(9, 9);
  replay->failed_puts = 1;
  ASSERT_OK(Learner::Create(Options(replay)).value()->Run());
  EXPECT_EQ(replay->snapshot.version, (SnapshotVersion{1, 9}));
  EXPECT_EQ(replay->events.back(), "release 9") << "the snapshot is there before another learner may come";
  EXPECT_EQ(Metric("orrery_learner_snapshot_put_errors_total"), 1);
}

// A learner whose run had one before.
class ReturningLearnerTest : public LearnerTest {
 protected:
  Learner::Options Waiting(absl::Duration patience) {
    replay_->generation = 2;
    Learner::Options options = Options(replay_);
    options.publisher = &waiting_publisher_;
    options.clock = &clock_;
    options.planner_patience = patience;
    return options;
  }

  FakeClock clock_;
  SnapshotPublisher waiting_publisher_{&clock_};
  const std::shared_ptr<FakeReplay> replay_ = std::make_shared<FakeReplay>(1, 1);
};

TEST_F(ReturningLearnerTest, WaitsForAPlanner) {
  class Planner : public SnapshotPublisher::Subscriber {
   public:
    void OnSnapshot(std::shared_ptr<const PublishedSnapshot>) override {}
    void OnClose() override {}
  } planner;
  Learner::Options options = Waiting(absl::Seconds(5));
  absl::Notification begun;
  options.on_update = [&](const Learner::UpdateReport&) { begun.Notify(); };
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options)));
  std::thread thread([&] { EXPECT_OK(learner->Run()); });
  clock_.AwaitWaiters(1);  // for a subscriber: time stands still
  EXPECT_FALSE(begun.HasBeenNotified());
  EXPECT_THAT(replay_->events, ElementsAre("put 2.0"));
  waiting_publisher_.Subscribe(&planner, {2, 1});  // it serves what the learner will publish, too
  thread.join();
  EXPECT_TRUE(begun.HasBeenNotified());
  EXPECT_EQ(clock_.Now(), absl::UnixEpoch()) << "it waited for no time to go by";
  waiting_publisher_.Unsubscribe(&planner);
}

TEST_F(ReturningLearnerTest, GoesOnWithoutAPlannerAfterAWhile) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(Waiting(absl::Milliseconds(400))));
  std::thread thread([&] { EXPECT_OK(learner->Run()); });
  clock_.AwaitWaiters(1);
  clock_.Advance(absl::Milliseconds(400));
  thread.join();
  EXPECT_EQ(replay_->events.back(), "release 1");
}

TEST_F(LearnerTest, ConcurrentPublishesAfterSomeTimeToo) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  experiment_.mutable_learning()->set_snapshot_every_updates(6);
  experiment_.mutable_learning()->set_snapshot_every_seconds(2.5);
  FakeClock clock;
  auto replay = std::make_shared<FakeReplay>(12, 12);
  std::vector<int64_t> published;
  Learner::Options options = Options(replay);
  options.clock = &clock;
  options.on_update = [&](const Learner::UpdateReport& report) {
    if (report.updates >= 7) clock.Advance(absl::Seconds(1));  // before: too quick for the time
  };
  options.on_snapshot = [&](SnapshotVersion version, const std::string&) { published.push_back(version.counter); };
  ASSERT_OK(Learner::Create(std::move(options)).value()->Run());
  // At 6 by their number; at 9 three seconds have gone by; at 12 by their number, and once more at the end.
  EXPECT_THAT(published, ElementsAre(0, 6, 9, 12, 12));
}

TEST_F(LearnerTest, EndsAfterTheMostUpdates) {
  for (const auto schedule : {config::v1::Learning::ALTERNATE, config::v1::Learning::CONCURRENT}) {
    experiment_.mutable_learning()->set_schedule(schedule);
    experiment_.mutable_learning()->set_max_updates(13);
    auto replay = std::make_shared<FakeReplay>(1000, 1000);
    Learner::Options options = Options(replay);
    const std::string folder = dir_ / config::v1::Learning::Schedule_Name(schedule);
    options.checkpoint_dir = folder;
    ASSERT_OK(Learner::Create(std::move(options)).value()->Run());
    EXPECT_EQ(replay->snapshot.version, (SnapshotVersion{1, 13}));
    EXPECT_EQ(replay->events.back(), "release 13");

    auto again = std::make_shared<FakeReplay>(1000, 1000);
    options = Options(again);
    options.checkpoint_dir = folder;
    options.resume = true;
    ASSERT_OK(Learner::Create(std::move(options)).value()->Run());
    EXPECT_EQ(again->snapshot.version, (SnapshotVersion{1, 13})) << "it had made them all";
  }
}

TEST_F(LearnerTest, WaitsForAllRowsOfDataThatDoNotGrow) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  const auto run = [&](bool late) {
    auto replay = std::make_shared<FakeReplay>(4, 4);
    Learner::Options options = Options(replay);
    options.wait_for_all_rows = true;
    auto watcher = std::make_unique<FakeWatcher>();
    FakeWatcher* const feed = watcher.get();
    options.watcher = std::move(watcher);
    std::unique_ptr<Learner> learner = Learner::Create(std::move(options)).value();
    for (size_t i = 0; i < (late ? 1 : data_.size()); ++i) feed->Push(data_[i]);
    std::thread thread([&] { EXPECT_OK(learner->Run()); });
    if (late) {
      replay->stats_asked.WaitForNotification();
      EXPECT_EQ(learner->progress().updates, 0);
      for (size_t i = 1; i < data_.size(); ++i) feed->Push(data_[i]);
    }
    thread.join();
    return Parameters(*replay);
  };
  ExpectSame(run(false), run(true));
}

TEST_F(LearnerTest, PublishesTheMeanOfTheWeights) {
  experiment_.mutable_learning()->set_weight_average_decay(0.5);
  std::vector<TensorMap> weights;
  for (const int64_t updates : {1, 2, 3}) {  // as they are
    config::v1::Experiment plain = experiment_;
    plain.mutable_learning()->clear_weight_average_decay();
    auto replay = std::make_shared<FakeReplay>(updates, 1);
    Learner::Options options = Options(replay);
    options.experiment = plain;
    ASSERT_OK(Learner::Create(std::move(options)).value()->Run());
    weights.push_back(Parameters(*replay));
  }
  auto replay = std::make_shared<FakeReplay>(3, 1);
  ASSERT_OK(Learner::Create(Options(replay)).value()->Run());
  for (const auto& [name, mean] : Parameters(*replay)) {
    const torch::Tensor expected = (weights[0].at(name) + 2 * weights[1].at(name) + 4 * weights[2].at(name)) / 7;
    EXPECT_TRUE(torch::allclose(mean, expected, 1e-5, 1e-6)) << name;
  }
}

// Of parameters that a dozen updates have moved by about 1e-2: sums of float32 in another order.
constexpr double kTolerance = 1e-6;

void ExpectNear(const TensorMap& expected, const TensorMap& actual) {
  ASSERT_EQ(expected.size(), actual.size());
  double largest = 0;
  for (const auto& [name, tensor] : expected) {
    largest = std::max(largest, (tensor - actual.at(name)).abs().max().item<double>());
    EXPECT_TRUE(torch::allclose(tensor, actual.at(name), /*rtol=*/0, kTolerance)) << name;
  }
  ::testing::Test::RecordProperty("largest_difference", absl::StrCat(largest));
}

// For rank 0, of two on this machine.
DataParallel::Options GroupOfTwo() {
  setenv("GLOO_SOCKET_IFNAME", "lo", 1);
  DataParallel::Options group;
  group.size = 2;
  group.master_address = "127.0.0.1";
  group.master_port = FreePort().value();
  return group;
}

// Both ranks as threads, with one data set that grows as rank 0 reports.
TEST_F(LearnerTest, TwoRanksLearnAsOneLearnerDoes) {
  experiment_.mutable_learning()->set_batch_size(4);
  std::shared_ptr<FakeReplay> straight;
  ASSERT_OK(Learner::Create(Alternating(16, 0, straight)).value()->Run());

  const DataParallel::Options group = GroupOfTwo();
  std::vector<std::unique_ptr<FakeWatcher>> watchers(2);
  for (auto& watcher : watchers) watcher = std::make_unique<FakeWatcher>();
  const auto replay = std::make_shared<AlternatingReplay>(16, 0, std::vector{watchers[0].get(), watchers[1].get()});
  const auto unused = std::make_shared<FakeReplay>(0, 0);
  prometheus::Registry registry;
  std::vector<Learner::Options> options;
  options.push_back(Options(replay));
  options.push_back(Options(unused));
  options[1].registry = &registry;
  for (int rank = 0; rank < 2; ++rank) options[rank].watcher = std::move(watchers[rank]);
  int64_t followed = 0;
  const auto run = [&](int rank) {
    DataParallel::Options mine = group;
    mine.rank = rank;
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<DataParallel> joined, DataParallel::Join(mine));
    options[rank].group = joined.get();
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options[rank])));
    EXPECT_OK(learner->Run());
    if (rank == 1) followed = learner->progress().updates;
  };
  std::thread other([&] { run(1); });
  run(0);
  other.join();
  EXPECT_EQ(followed, 16);
  EXPECT_TRUE(unused->events.empty());
  EXPECT_EQ(replay->snapshot.version, (SnapshotVersion{1, 16}));
  ExpectNear(Parameters(*straight), Parameters(*replay));
}

TEST_F(LearnerTest, RefusesABatchThatRanksCannotShare) {
  const DataParallel::Options group = GroupOfTwo();
  std::thread other([other_rank = group]() mutable {
    other_rank.rank = 1;
    EXPECT_OK(DataParallel::Join(other_rank));
  });
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<DataParallel> joined, DataParallel::Join(group));
  other.join();
  Learner::Options options = Options(std::make_shared<FakeReplay>(1, 1));
  options.group = joined.get();
  EXPECT_THAT(Learner::Create(std::move(options)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("batch_size 3 cannot be shared by 2 ranks")));
}

// One rank, in a process of its own; RANK_VICTIM dies after update 6, and the other then has to find that out. -1: none dies.
TEST_F(LearnerTest, DISABLED_IsARank) {
  const char *folder = std::getenv("RANK_FOLDER"), *victim_text = std::getenv("RANK_VICTIM");
  if (folder == nullptr || victim_text == nullptr) GTEST_SKIP() << "is run by the test after it";
  ASSERT_OK_AND_ASSIGN(const std::optional<DataParallel::Options> group, DataParallel::FromEnvironment());
  ASSERT_TRUE(group.has_value());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<DataParallel> joined, DataParallel::Join(*group));
  experiment_.mutable_learning()->set_batch_size(4);
  const int victim = std::atoi(victim_text);
  auto replay = std::make_shared<FakeReplay>(12, 4);
  Learner::Options options = Options(replay);
  options.group = joined.get();
  options.resume = true;
  if (group->rank == 0) options.checkpoint_dir = folder;
  std::optional<int64_t> first;
  options.on_update = [&](const Learner::UpdateReport& report) {
    first = first.value_or(report.updates);
    if (group->rank == victim && report.updates == 6) kill(getpid(), SIGKILL);
  };
  const absl::Status status = Learner::Create(std::move(options)).value()->Run();
  if (victim >= 0) {
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("a rank was lost")));
    if (group->rank == 0) {
      EXPECT_EQ(replay->events.back(), "release 4") << "who comes next does not wait for the lease";
    }
    return;
  }
  ASSERT_OK(status);
  EXPECT_EQ(first, 5) << "it goes on behind the checkpoint";
  if (group->rank == 0) {
    ASSERT_OK(WriteFileAtomically(std::string(folder) + "/snapshot", replay->snapshot.file));
  }
}

// Rank 0 holds the lease, the checkpoints and the store at which the ranks meet.
class LostRankTest : public LearnerTest, public ::testing::WithParamInterface<int> {};

TEST_P(LostRankTest, TheOtherEndsAndBothGoOnFromTheCheckpoint) {
  experiment_.mutable_learning()->set_batch_size(4);
  auto straight = std::make_shared<FakeReplay>(12, 4);
  ASSERT_OK(Learner::Create(Options(straight)).value()->Run());
  const std::string program = std::filesystem::read_symlink("/proc/self/exe");
  const auto log = [&](int rank) { return dir_ / absl::StrCat("rank", rank, ".log"); };
  const auto start = [&](int rank, int port, int victim) {
    return ChildProcess::Start({"env", "WORLD_SIZE=2", absl::StrCat("RANK=", rank), "MASTER_ADDR=127.0.0.1",
                                absl::StrCat("MASTER_PORT=", port), "GLOO_SOCKET_IFNAME=lo",
                                absl::StrCat("RANK_FOLDER=", dir_.path()), absl::StrCat("RANK_VICTIM=", victim), program,
                                "--gtest_also_run_disabled_tests", "--gtest_filter=*.DISABLED_IsARank"},
                               log(rank))
        .value();
  };
  for (const int victim : {GetParam(), -1}) {
    const int port = FreePort().value();
    const std::unique_ptr<ChildProcess> ranks[] = {start(0, port, victim), start(1, port, victim)};
    for (const int rank : {0, 1}) {
      if (rank == victim) continue;
      // Below the limit of a minute: a rank that is gone is noticed at once.
      EXPECT_OK(ranks[rank]->Await(absl::Seconds(50))) << ReadFile(log(rank)).value_or("");
    }
  }
  auto resumed = std::make_shared<FakeReplay>(0, 0);
  ASSERT_OK_AND_ASSIGN(resumed->snapshot.file, ReadFile(dir_ / "snapshot"));
  ExpectNear(Parameters(*straight), Parameters(*resumed));
}

INSTANTIATE_TEST_SUITE_P(Ranks, LostRankTest, ::testing::Values(0, 1));

TEST_F(LearnerTest, StopsWhenFencedOff) {
  auto replay = std::make_shared<FakeReplay>(100, 3);
  replay->fence_at = 3;
  EXPECT_THAT(Learner::Create(Options(replay)).value()->Run(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("another learner took this run over")));
}

TEST_F(LearnerTest, WaitsForTheLeaseAndThroughAnOutage) {
  FakeClock clock;
  auto replay = std::make_shared<FakeReplay>(3, 3);
  replay->refusal = absl::AlreadyExistsError("held by learner-1");
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

TEST_F(LearnerTest, GoesOnFromWhereTheLearnerIsThatItWaitedFor) {
  auto straight = std::make_shared<FakeReplay>(12, 4);
  ASSERT_OK(Learner::Create(Options(straight)).value()->Run());
  const auto with_checkpoints = [&](std::shared_ptr<FakeReplay> replay) {
    Learner::Options options = Options(std::move(replay));
    options.checkpoint_dir = dir_.path();
    options.resume = true;
    return Learner::Create(std::move(options)).value();
  };
  const std::unique_ptr<Learner> other = with_checkpoints(std::make_shared<FakeReplay>(8, 4));
  auto replay = std::make_shared<FakeReplay>(12, 4);
  replay->generation = 2;
  replay->refusal = absl::AlreadyExistsError("held by the other");
  replay->while_refused = [&] { EXPECT_OK(other->Run()); };
  const std::unique_ptr<Learner> waiting = with_checkpoints(replay);
  ASSERT_OK(waiting->Run());
  EXPECT_THAT(replay->events, ElementsAre("put 2.8", "report 8", "put 2.12", "report 12", "release 12"));
  ExpectSame(Parameters(*straight), Parameters(*replay));
}

TEST_F(LearnerTest, OnlyAFinalRefusalEndsTheWaitForTheLease) {
  auto replay = std::make_shared<FakeReplay>(3, 3);
  replay->refusal = absl::ResourceExhaustedError("Redis is full");
  EXPECT_OK(Learner::Create(Options(replay)).value()->Run());
  replay = std::make_shared<FakeReplay>(3, 3);
  replay->refusal = absl::InvalidArgumentError("no such run");
  EXPECT_THAT(Learner::Create(Options(replay)).value()->Run(), StatusIs(absl::StatusCode::kInvalidArgument));
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
  options.on_update = [this](const Learner::UpdateReport&) { std::filesystem::remove(dir_ / "gone"); };
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Learner> learner, Learner::Create(std::move(options)));
  ASSERT_OK(learner->Run());
  EXPECT_EQ(learner->progress().updates, 3);
  // After each update, after the block and at the end.
  EXPECT_EQ(Metric("orrery_learner_checkpoint_errors_total"), 5);
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

// Blocks that end where a checkpoint was gone back to: what is saved then is no progress.
TEST_F(LearnerTest, GivesUpAlsoWhenEveryBlockEndsWithAReturnToTheCheckpoint) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::ALTERNATE);
  ArrayMap rows = TestRows(1, 0, kRows, /*with_image=*/false);
  for (float& reward : rows[kReward].mutable_as<float>()) reward = 1e30f;
  data_ = {Appended(MakeChunk(1, 0, kRows, rows)), CaughtUp()};
  Learner::Options options = Options(std::make_shared<FakeReplay>(1000, 10));
  options.checkpoint_dir = dir_.path();
  EXPECT_THAT(Learner::Create(std::move(options)).value()->Run(),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("not finite")));
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
