#include "services/planner/snapshot_subscriber.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <vector>

#include "absl/time/clock.h"
#include "libs/base/log_testing.h"
#include "libs/base/status_matchers.h"
#include "libs/client/chunk_proto.h"
#include "libs/serving/testing.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

// A learner that sends what the test says and writes down what planners report. It ends the stream at a nullopt.
class FakeLearner : public learner::v1::LearnerService::Service {
 public:
  struct Item {
    Store::Snapshot snapshot;
    bool damaged = false;
  };
  grpc::Status SubscribeSnapshots(
      grpc::ServerContext*, grpc::ServerReaderWriter<learner::v1::SubscribeSnapshotsResponse,
                                                     learner::v1::SubscribeSnapshotsRequest>* stream) override {
    learner::v1::SubscribeSnapshotsRequest report;
    while (stream->Read(&report)) {
      std::optional<Item> item;
      {
        absl::MutexLock lock(&mu_);
        EXPECT_EQ(report.run(), "tiny");
        EXPECT_EQ(report.planner_id(), "planner-1");
        reports_.push_back(report.has_serving_version() ? report.serving_version().counter() : -1);
        auto next = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return !items_.empty() || ended_; };
        mu_.Await(absl::Condition(&next));
        if (ended_) return grpc::Status::OK;
        item = items_.front();
        items_.pop_front();
      }
      if (!item.has_value()) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "going away");
      (void)SplitSnapshot(item->snapshot, [&](const common::v1::SnapshotPart& part) {
        learner::v1::SubscribeSnapshotsResponse response;
        *response.mutable_part() = part;
        if (item->damaged) response.mutable_part()->set_checksum(part.checksum() + 1);
        return stream->Write(response);
      });
    }
    return grpc::Status::OK;
  }
  void Send(std::optional<Item> item) {
    absl::MutexLock lock(&mu_);
    items_.push_back(std::move(item));
  }
  std::vector<int64_t> AwaitReports(size_t n) {
    absl::MutexLock lock(&mu_);
    auto enough = [this, n]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return reports_.size() >= n; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30)));
    return reports_;
  }
  void End() {
    absl::MutexLock lock(&mu_);
    ended_ = true;
  }

 private:
  absl::Mutex mu_;
  std::deque<std::optional<Item>> items_ ABSL_GUARDED_BY(mu_);
  std::vector<int64_t> reports_ ABSL_GUARDED_BY(mu_);
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
};

// A replay that keeps one snapshot.
class FakeReplay : public replay::v1::ReplayService::Service {
 public:
  grpc::Status GetStats(grpc::ServerContext* context, const replay::v1::GetStatsRequest* request,
                        replay::v1::GetStatsResponse* response) override {
    EXPECT_EQ(request->run(), "tiny");
    absl::MutexLock lock(&mu_);
    ++questions_;
    if (away_) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "replay is away");
    while (hangs_ && !context->IsCancelled()) answers_.WaitWithTimeout(&mu_, absl::Milliseconds(10));
    if (snapshot_.has_value()) *response->mutable_snapshot_version() = ToProto(snapshot_->version);
    return grpc::Status::OK;
  }
  grpc::Status GetSnapshot(grpc::ServerContext*, const replay::v1::GetSnapshotRequest*,
                           grpc::ServerWriter<replay::v1::GetSnapshotResponse>* writer) override {
    absl::MutexLock lock(&mu_);
    ++fetched_;
    (void)SplitSnapshot(*snapshot_, [&](const common::v1::SnapshotPart& part) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      replay::v1::GetSnapshotResponse response;
      *response.mutable_part() = part;
      if (damaged_) response.mutable_part()->set_checksum(part.checksum() + 1);
      return writer->Write(response);
    });
    return grpc::Status::OK;
  }
  void Keep(Store::Snapshot snapshot) {
    absl::MutexLock lock(&mu_);
    snapshot_ = std::move(snapshot);
  }
  void AwaitMoreQuestions(int more) {
    absl::MutexLock lock(&mu_);
    auto enough = [this, target = questions_ + more]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return questions_ >= target; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30)));
  }
  // Of all its time.
  void AwaitQuestions(int questions) {
    absl::MutexLock lock(&mu_);
    auto enough = [this, questions]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return questions_ >= questions; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30)));
  }
  int questions() const {
    absl::MutexLock lock(&mu_);
    return questions_;
  }
  int fetched() const {
    absl::MutexLock lock(&mu_);
    return fetched_;
  }
  // From now on it answers with an error, or not at all.
  void GoAway() {
    absl::MutexLock lock(&mu_);
    away_ = true;
  }
  void Hang() {
    absl::MutexLock lock(&mu_);
    hangs_ = true;
  }
  // From now on parts say a checksum that is not theirs.
  void Damage() {
    absl::MutexLock lock(&mu_);
    damaged_ = true;
  }

 private:
  mutable absl::Mutex mu_;
  absl::CondVar answers_;
  bool away_ ABSL_GUARDED_BY(mu_) = false;
  bool hangs_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<Store::Snapshot> snapshot_ ABSL_GUARDED_BY(mu_);
  int questions_ ABSL_GUARDED_BY(mu_) = 0;
  int fetched_ ABSL_GUARDED_BY(mu_) = 0;
  bool damaged_ ABSL_GUARDED_BY(mu_) = false;
};

Store::Snapshot SnapshotOf(int64_t counter, int64_t generation = 1) {
  return {{generation, counter}, TinySnapshot(counter, static_cast<uint64_t>(counter))};
}

class SnapshotSubscriberTest : public ::testing::Test {
 protected:
  SnapshotSubscriberTest()
      : learner_server_(grpc::ServerBuilder().RegisterService(&learner_).BuildAndStart()),
        replay_server_(grpc::ServerBuilder().RegisterService(&replay_).BuildAndStart()) {
    holder_options_.registry = registry_;
    holder_options_.on_swap = [this](const ServedModel& served) {
      absl::MutexLock lock(&mu_);
      swapped_.push_back(served.version.counter);
    };
    options_.run = "tiny";
    options_.planner_id = "planner-1";
    options_.poll_interval = absl::Milliseconds(1);
  }
  ~SnapshotSubscriberTest() override {
    subscriber_.reset();
    learner_.End();
    learner_server_->Shutdown();
    replay_server_->Shutdown();
  }
  void Start(bool with_learner, bool with_replay) {
    holder_ = std::make_unique<SnapshotHolder>(holder_options_);
    options_.holder = holder_.get();
    if (with_learner) options_.learner = learner_server_->InProcessChannel({});
    if (with_replay) options_.replay = replay_server_->InProcessChannel({});
    subscriber_ = std::make_unique<SnapshotSubscriber>(options_);
  }
  std::vector<int64_t> AwaitSwaps(size_t n) {
    absl::MutexLock lock(&mu_);
    auto enough = [this, n]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return swapped_.size() >= n; };
    EXPECT_TRUE(mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(30)));
    return swapped_;
  }

  // On `clock_`: looks at replay, `apart` from each other; the last one is over at the end, too.
  void AwaitLooks(int looks, absl::Duration apart) {
    for (int i = 0; i < looks; ++i) {
      clock_.AwaitWaiters(1);
      clock_.Advance(apart);
      replay_.AwaitQuestions(++looks_ + 1);  // the first came by itself
    }
    clock_.AwaitWaiters(1);
  }
  double Refused() {
    for (const auto& family : registry_->Collect()) {
      if (family.name == "orrery_planner_snapshots_refused_total") return family.metric.at(0).counter.value;
    }
    return -1;
  }

  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  FakeClock clock_{absl::FromUnixSeconds(1000)};
  int looks_ = 0;
  FakeLearner learner_;
  FakeReplay replay_;
  std::unique_ptr<grpc::Server> learner_server_;
  std::unique_ptr<grpc::Server> replay_server_;
  SnapshotHolder::Options holder_options_;
  SnapshotSubscriber::Options options_;
  std::unique_ptr<SnapshotHolder> holder_;
  absl::Mutex mu_;
  std::vector<int64_t> swapped_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<SnapshotSubscriber> subscriber_;
};

TEST_F(SnapshotSubscriberTest, LoadsWhatTheLearnerSendsAndAnswersWithWhatIsServed) {
  Start(true, false);
  learner_.Send(FakeLearner::Item{SnapshotOf(0)});
  learner_.Send(FakeLearner::Item{SnapshotOf(100)});
  EXPECT_THAT(learner_.AwaitReports(3), ElementsAre(-1, 0, 100));
  EXPECT_THAT(AwaitSwaps(2), ElementsAre(0, 100));
}

TEST_F(SnapshotSubscriberTest, ReportsTheOldVersionWhenASnapshotIsRefused) {
  Start(true, false);
  learner_.Send(FakeLearner::Item{SnapshotOf(1)});
  learner_.Send(FakeLearner::Item{{{1, 2}, "neither safe nor a tensor"}});
  learner_.Send(FakeLearner::Item{SnapshotOf(3)});
  EXPECT_THAT(learner_.AwaitReports(4), ElementsAre(-1, 1, 1, 3));
}

TEST_F(SnapshotSubscriberTest, SaysOnceThatTheLearnerIsBehind) {
  CapturedLog log("warning");
  Start(true, false);
  for (const int64_t counter : {7, 7, 1, 2}) learner_.Send(FakeLearner::Item{SnapshotOf(counter)});
  EXPECT_THAT(learner_.AwaitReports(5), ElementsAre(-1, 7, 7, 7, 7));
  const std::string lines = log.Take();
  EXPECT_THAT(lines, HasSubstr("restart the planner, error=\"ALREADY_EXISTS: snapshot 1.1 is not newer than 1.7"));
  EXPECT_EQ(std::count(lines.begin(), lines.end(), '\n'), 1) << lines;
}

TEST_F(SnapshotSubscriberTest, AHeldPlannerAnswersWithTheNewestItHas) {
  Start(true, false);
  learner_.Send(FakeLearner::Item{SnapshotOf(1)});
  learner_.Send(FakeLearner::Item{SnapshotOf(2)});
  EXPECT_THAT(learner_.AwaitReports(3), ElementsAre(-1, 1, 2));
  ASSERT_OK(holder_->Rollback());
  learner_.Send(FakeLearner::Item{SnapshotOf(3)});
  EXPECT_THAT(learner_.AwaitReports(4), ElementsAre(-1, 1, 2, 3));
  EXPECT_EQ(holder_->version().counter, 1);
}

TEST_F(SnapshotSubscriberTest, ComesBackAfterTheLearnerWentAwayAndSaysWhatItServes) {
  Start(true, false);
  learner_.Send(FakeLearner::Item{SnapshotOf(1)});
  learner_.Send(std::nullopt);
  learner_.Send(FakeLearner::Item{SnapshotOf(2)});
  EXPECT_THAT(learner_.AwaitReports(4), ElementsAre(-1, 1, 1, 2));
}

TEST_F(SnapshotSubscriberTest, ComesBackAfterDamagedParts) {
  CapturedLog log("info");
  Start(true, false);
  learner_.Send(FakeLearner::Item{SnapshotOf(1), /*damaged=*/true});
  learner_.Send(FakeLearner::Item{SnapshotOf(1)});
  EXPECT_THAT(AwaitSwaps(1), ElementsAre(1));
  EXPECT_EQ(Refused(), 1);
  const std::string lines = log.Take();
  EXPECT_THAT(lines, HasSubstr("snapshot refused version=1.1 serving=nothing error=\"DATA_LOSS: snapshot from the learner: "));
  EXPECT_THAT(lines, HasSubstr("snapshots come from the learner again"));
}

TEST_F(SnapshotSubscriberTest, SaysOfDamagedPartsAfterALongStreamToo) {
  CapturedLog log("warning");
  options_.clock = &clock_;
  Start(true, false);
  learner_.Send(FakeLearner::Item{SnapshotOf(1)});
  EXPECT_THAT(learner_.AwaitReports(2), ElementsAre(-1, 1));
  clock_.Advance(absl::Hours(1));
  learner_.Send(FakeLearner::Item{SnapshotOf(2), /*damaged=*/true});
  clock_.AwaitWaiters(1);
  EXPECT_EQ(Refused(), 1);
  const std::string lines = log.Take();
  EXPECT_THAT(lines, HasSubstr("snapshot refused version=1.2 serving=1.1 error=\"DATA_LOSS: snapshot from the learner: "));
  EXPECT_THAT(lines, HasSubstr("no new snapshots for now, trying on learner=\"DATA_LOSS: snapshot from the learner: "));
}

TEST_F(SnapshotSubscriberTest, TheEndOfALongStreamIsNoTrouble) {
  CapturedLog log("warning");
  options_.clock = &clock_;
  Start(true, false);
  learner_.AwaitReports(1);
  clock_.Advance(absl::Hours(1));
  learner_.Send(std::nullopt);
  clock_.AwaitWaiters(1);
  EXPECT_EQ(log.Take(), "");
}

TEST_F(SnapshotSubscriberTest, WithoutALearnerTakesTheNewestFromReplayOnce) {
  replay_.Keep(SnapshotOf(5));
  Start(false, true);
  EXPECT_THAT(AwaitSwaps(1), ElementsAre(5));
  replay_.AwaitMoreQuestions(3);
  EXPECT_EQ(replay_.fetched(), 1);
  replay_.Keep(SnapshotOf(6));
  EXPECT_THAT(AwaitSwaps(2), ElementsAre(5, 6));
}

TEST_F(SnapshotSubscriberTest, FetchesARefusedSnapshotAgainOnlyAfterAPause) {
  options_.clock = &clock_;
  replay_.Keep({{1, 5}, "neither safe nor a tensor"});
  Start(false, true);
  AwaitLooks(10, options_.poll_interval);
  EXPECT_EQ(replay_.fetched(), 1);
  EXPECT_EQ(Refused(), 1);
  AwaitLooks(1, SnapshotSubscriber::kRefusedPause);
  AwaitLooks(10, options_.poll_interval);
  EXPECT_EQ(replay_.fetched(), 2) << "what was wrong might have passed";
  EXPECT_EQ(Refused(), 2);
  replay_.Keep(SnapshotOf(6));
  AwaitLooks(1, options_.poll_interval);
  EXPECT_THAT(AwaitSwaps(1), ElementsAre(6));
  EXPECT_EQ(replay_.fetched(), 3);
}

TEST_F(SnapshotSubscriberTest, FetchesASnapshotWithDamagedPartsAgainOnlyAfterAPause) {
  CapturedLog log("warning");
  options_.clock = &clock_;
  replay_.Damage();
  replay_.Keep(SnapshotOf(5));
  Start(false, true);
  AwaitLooks(10, options_.poll_interval);
  EXPECT_EQ(replay_.fetched(), 1);
  EXPECT_EQ(Refused(), 1);
  EXPECT_THAT(log.Take(),
              HasSubstr("snapshot refused version=1.5 serving=nothing error=\"DATA_LOSS: snapshot from replay: "));
}

TEST_F(SnapshotSubscriberTest, StartsFromReplayWhileTheLearnerIsAway) {
  learner_.Send(std::nullopt);
  replay_.Keep(SnapshotOf(5));
  Start(true, true);
  EXPECT_THAT(AwaitSwaps(1), ElementsAre(5));
  learner_.Send(FakeLearner::Item{SnapshotOf(7)});
  EXPECT_THAT(AwaitSwaps(2), ElementsAre(5, 7));
  EXPECT_EQ(replay_.fetched(), 1);
}

TEST_F(SnapshotSubscriberTest, StartsFromReplayWhileTheLearnerIsSilent) {
  Start(true, true);
  replay_.AwaitMoreQuestions(3);
  EXPECT_EQ(holder_->Get(), nullptr);
  replay_.Keep(SnapshotOf(5));
  EXPECT_THAT(AwaitSwaps(1), ElementsAre(5));
  for (int64_t counter : {7, 8}) learner_.Send(FakeLearner::Item{SnapshotOf(counter)});
  EXPECT_THAT(learner_.AwaitReports(3), ElementsAre(-1, 7, 8)) << "in the same stream";
  EXPECT_EQ(replay_.fetched(), 1);
  const int questions = replay_.questions();
  for (int64_t counter : {9, 10, 11}) learner_.Send(FakeLearner::Item{SnapshotOf(counter)});
  learner_.AwaitReports(6);
  EXPECT_EQ(replay_.questions(), questions) << "something is loaded: replay is left alone";
}

TEST_F(SnapshotSubscriberTest, TroubleWithReplayKeepsNoSnapshotOfTheLearnersAway) {
  CapturedLog log("info");
  replay_.GoAway();
  Start(true, true);
  EXPECT_THAT(learner_.AwaitReports(1), ElementsAre(-1));
  replay_.AwaitMoreQuestions(3);
  learner_.Send(FakeLearner::Item{SnapshotOf(7)});
  EXPECT_THAT(learner_.AwaitReports(2), ElementsAre(-1, 7));
  const std::string lines = log.Take();
  const std::string trouble = "no new snapshots for now, trying on replay=\"UNAVAILABLE: replay is away\"";
  const size_t found = lines.find(trouble);
  ASSERT_NE(found, std::string::npos) << lines;
  EXPECT_THAT(lines.substr(found + trouble.size()), Not(HasSubstr(trouble))) << "once";
}

TEST_F(SnapshotSubscriberTest, WaitsWhileReplayHasNoneYet) {
  Start(false, true);
  replay_.AwaitMoreQuestions(2);
  EXPECT_EQ(holder_->Get(), nullptr);
  replay_.Keep(SnapshotOf(0));
  EXPECT_THAT(AwaitSwaps(1), ElementsAre(0));
}

TEST_F(SnapshotSubscriberTest, EndsAtOnceWhileAStreamIsOpen) {
  Start(true, false);
  learner_.AwaitReports(1);
  const absl::Time begin = absl::Now();
  subscriber_.reset();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
}

TEST_F(SnapshotSubscriberTest, EndsAtOnceWhileReplayDoesNotAnswerBesideAnOpenStream) {
  replay_.Hang();
  Start(true, true);
  replay_.AwaitQuestions(1);
  const absl::Time begin = absl::Now();
  subscriber_.reset();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(4)) << "replay's deadline is 5 s";
}

}  // namespace
}  // namespace orrery
