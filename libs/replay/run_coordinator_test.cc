#include "libs/replay/run_coordinator.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>
#include <tuple>

#include "absl/synchronization/notification.h"
#include "libs/base/clock.h"
#include "libs/base/random.h"
#include "libs/base/status_matchers.h"
#include "libs/replay/memory_store.h"
#include "libs/replay/testing/fault_store.h"

namespace orrery {
namespace {

using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::Eq;
using ::testing::HasSubstr;
using ::testing::Ne;

constexpr uint64_t kSpec = 0xdeadbeef;

config::v1::Experiment Alternate(int seeds, int initial, int per_episode) {
  config::v1::Experiment e;
  e.set_name("test");
  e.set_seed(7);
  e.mutable_collection()->set_seed_episodes(seeds);
  e.mutable_learning()->set_schedule(config::v1::Learning::ALTERNATE);
  e.mutable_learning()->set_initial_updates(initial);
  e.mutable_learning()->set_updates_per_episode(per_episode);
  e.mutable_evaluation()->set_every_episodes(0);
  return e;
}

config::v1::Experiment Concurrent(int seeds, double updates_per_row, double tolerance) {
  config::v1::Experiment e = Alternate(seeds, 0, 1);
  e.mutable_learning()->clear_initial_updates();
  e.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  e.mutable_replay()->mutable_limiter()->set_updates_per_row(updates_per_row);
  e.mutable_replay()->mutable_limiter()->set_tolerance(tolerance);
  return e;
}

ChunkInfo Rows(int64_t episode, int64_t first_row, int32_t rows, EpisodeEnd end = EpisodeEnd::kContinues) {
  ChunkInfo info;
  info.key = {episode, first_row};
  info.rows = rows;
  info.end = end;
  return info;
}

// In the order written, which `+` does not promise.
std::string Joined(std::initializer_list<std::string> parts) {
  std::string all;
  for (const std::string& part : parts) all += part;
  return all;
}

// Counts, and lets a test act before each write.
class WatchedStore : public FaultStore {
 public:
  explicit WatchedStore(Store* store) : FaultStore(store, std::numeric_limits<int>::max()), target(store) {}
  std::atomic<Store*> target;
  std::atomic<int> writes = 0;
  std::atomic<int> values_sent = 0;
  std::function<absl::Status(int n)> before_write;  // the n-th one; an error is what the writer gets

  absl::StatusOr<TimedValue> GetUnlessKnown(const std::string& name, const ValueIdentity& known) override {
    auto answer = target.load()->GetUnlessKnown(name, known);
    if (answer.ok() && answer->value.has_value()) ++values_sent;
    return answer;
  }
  absl::Status CompareAndSet(const std::string& name, int64_t version, const std::string& value) override {
    const int n = ++writes;
    const absl::Status status = before_write ? before_write(n) : absl::OkStatus();
    return status.ok() ? target.load()->CompareAndSet(name, version, value) : status;
  }
};

class RunCoordinatorTest : public ::testing::Test {
 protected:
  // One episode with its mode's letter: R, T or E; "-" for not now, "." for complete.
  std::string Begin(RunCoordinator& c) {
    const auto episode = c.BeginEpisode("actor", kSpec);
    EXPECT_OK(episode);
    if (!episode.ok()) return "!";
    if (!episode->has_value()) return "-";
    if ((*episode)->run_complete) return ".";
    last_ = **episode;
    return std::string(1, " RTE"[static_cast<int>(last_.mode)]);
  }
  void Finish(RunCoordinator& c, int rows = 10) { EXPECT_OK(c.RecordChunk(Rows(last_.episode_id, 0, rows, EpisodeEnd::kTruncated))); }
  std::string Play(RunCoordinator& c, int rows = 10) {
    const std::string mode = Begin(c);
    if (mode != "-" && mode != ".") Finish(c, rows);
    return mode;
  }
  using Answer = absl::StatusOr<std::optional<EpisodeAssignment>>;
  // Of the episode; 0: none.
  static int64_t Number(const Answer& answer) { return std::get<1>(Fields(answer)); }
  // All that an actor is told.
  static std::tuple<std::string, int64_t, EpisodeMode, std::string, uint64_t, bool> Fields(const Answer& answer) {
    EXPECT_OK(answer);
    const EpisodeAssignment e = answer.ok() && answer->has_value() ? **answer : EpisodeAssignment{};
    return {e.run_id, e.episode_id, e.mode, e.task, e.seed, e.run_complete};
  }
  int Reserve(RunCoordinator& c, int64_t generation, int64_t done, int wanted) {
    const auto grant = c.ReserveUpdates(generation, done, wanted);
    EXPECT_OK(grant);
    complete_ = grant.ok() && grant->run_complete;
    return grant.ok() ? grant->updates : -1;
  }

  // Runs the calls on threads of their own: while the first one writes, all others wait, so that they are served together. The
  // writes after the first one go through `then`.
  static void Together(RunCoordinator& c, WatchedStore& store, const std::vector<std::function<void()>>& calls,
                       const std::function<absl::Status(int)>& then = [](int) { return absl::OkStatus(); }) {
    absl::Notification writing, go_on;
    const int first = store.writes + 1;
    store.before_write = [&](int n) {
      if (n != first) return then(n - first);
      writing.Notify();
      go_on.WaitForNotification();
      return absl::OkStatus();
    };
    std::vector<std::thread> threads;
    for (const std::function<void()>& call : calls) {
      threads.emplace_back(call);
      writing.WaitForNotification();
    }
    while (c.waiting() < static_cast<int>(calls.size())) std::this_thread::yield();
    go_on.Notify();
    for (std::thread& thread : threads) thread.join();
    store.before_write = nullptr;
  }

  FakeClock clock_{absl::FromUnixSeconds(1700000000)};
  std::unique_ptr<Store> store_ = MakeMemoryStore({}, clock_);
  EpisodeAssignment last_;
  bool complete_ = false;
};

// PlaNet's Algorithm 1: S random episodes, updates, then one episode and C updates by turns.
TEST_F(RunCoordinatorTest, AlternateRunsAlgorithmOneInOrder) {
  config::v1::Experiment e = Alternate(3, 20, 10);
  e.mutable_learning()->set_max_episodes(7);
  e.mutable_evaluation()->set_every_episodes(2);
  e.mutable_evaluation()->set_episodes(2);
  RunCoordinator c(store_.get(), e, clock_);
  ASSERT_OK_AND_ASSIGN(const int64_t generation, c.AcquireLearner("learner"));
  // Actor and learner both try as often as they like, in a scrambled order: only one order of events comes out.
  std::string order;
  int64_t done = 0;
  std::mt19937_64 random(3);
  for (int i = 0; i < 2000 && !(complete_ && order.back() == '.'); ++i) {
    if (random() % 2 == 0) {
      const int granted = Reserve(c, generation, done, 1 + random() % 4);
      done += granted;
      order += std::string(granted, 'u');
    } else if (const std::string mode = Begin(c); mode == ".") {
      if (order.back() != '.') order += ".";
    } else if (mode != "-") {
      order += mode;
      // The learner gets nothing while an episode runs.
      EXPECT_EQ(Reserve(c, generation, done, 5), 0);
      const int64_t id = last_.episode_id;
      const std::string next = Begin(c);
      if (order == "R") {  // seed episodes may run side by side, nothing else
        EXPECT_EQ(next, "R");
        order += next;
        Finish(c);
      } else {
        EXPECT_THAT(next, AnyOf("-", ".")) << order;
      }
      EXPECT_OK(c.RecordChunk(Rows(id, 0, 10, EpisodeEnd::kTerminated)));
    }
  }
  const std::string ten(10, 'u');
  EXPECT_EQ(order, "RRR" + ten + ten + "T" + ten + "T" + ten + "EE" + "T" + ten + "T" + ten + "EE.");
  ASSERT_OK_AND_ASSIGN(const RunProgress progress, c.Progress());
  EXPECT_EQ(progress.episodes_started, 7);
  EXPECT_EQ(progress.episodes_finished, 7);
  EXPECT_EQ(progress.rows_appended, 70);
  EXPECT_EQ(progress.updates_done, 60);
}

TEST_F(RunCoordinatorTest, NumbersAndSeedsEpisodesReproducibly) {
  config::v1::Experiment e = Alternate(2, 0, 1);
  e.mutable_evaluation()->set_every_episodes(1);
  e.mutable_evaluation()->set_episodes(2);
  const auto play = [&] {
    const std::unique_ptr<Store> store = MakeMemoryStore({}, clock_);
    RunCoordinator c(store.get(), e, clock_);
    const int64_t generation = *c.AcquireLearner("learner");
    std::vector<std::tuple<int64_t, EpisodeMode, uint64_t>> episodes;
    for (int i = 0, done = 0; i < 8; ++i) {
      EXPECT_NE(Play(c), "-");
      episodes.emplace_back(last_.episode_id, last_.mode, last_.seed);
      done += Reserve(c, generation, done, 10);
      Reserve(c, generation, done, 0);
    }
    return episodes;
  };
  const auto environment = [](uint64_t i) { return DeriveSeed(7, "environment", i); };
  const auto evaluation = [](uint64_t i) { return DeriveSeed(7, "evaluation", i); };
  using M = EpisodeMode;
  const auto episodes = play();
  EXPECT_THAT(episodes, ElementsAre(Eq(std::tuple{1, M::kRandom, environment(0)}), Eq(std::tuple{2, M::kRandom, environment(1)}),
                                    Eq(std::tuple{3, M::kTrain, environment(2)}), Eq(std::tuple{4, M::kEvaluate, evaluation(0)}),
                                    Eq(std::tuple{5, M::kEvaluate, evaluation(1)}), Eq(std::tuple{6, M::kTrain, environment(3)}),
                                    Eq(std::tuple{7, M::kEvaluate, evaluation(0)}), Eq(std::tuple{8, M::kEvaluate, evaluation(1)})));
  EXPECT_EQ(play(), episodes);
}

TEST_F(RunCoordinatorTest, TasksTakeTurns) {
  config::v1::Experiment e = Alternate(3, 0, 1);
  for (const char* name : {"a", "b"}) e.mutable_environment()->add_tasks()->set_name(name);
  e.mutable_evaluation()->set_every_episodes(2);
  e.mutable_evaluation()->set_episodes(2);
  RunCoordinator c(store_.get(), e, clock_);
  const int64_t generation = *c.AcquireLearner("learner");
  std::string order;
  std::vector<uint64_t> evaluated;
  for (int i = 0, done = 0; i < 10; ++i) {
    order += Play(c) + last_.task + " ";
    if (last_.mode == EpisodeMode::kEvaluate) evaluated.push_back(last_.seed);
    done += Reserve(c, generation, done, 10);
    Reserve(c, generation, done, 0);
  }
  EXPECT_EQ(order, "Ra Rb Ra Tb Ta Ea Eb Ea Eb Tb ");
  const auto seed = [](uint64_t i) { return DeriveSeed(7, "evaluation", i); };
  EXPECT_THAT(evaluated, ElementsAre(seed(0), seed(0), seed(1), seed(1))) << "every task meets the same seeds";
}

TEST_F(RunCoordinatorTest, CollectsWithRandomActionsThroughout) {
  config::v1::Experiment e = Alternate(1, 0, 1);
  e.mutable_collection()->set_random_actions(true);
  e.mutable_evaluation()->set_every_episodes(2);
  RunCoordinator c(store_.get(), e, clock_);
  const int64_t generation = *c.AcquireLearner("learner");
  std::string order;
  for (int i = 0, done = 0; i < 5; ++i) {
    order += Play(c);
    const int granted = Reserve(c, generation, done, 10);
    if (granted > 0) {
      EXPECT_EQ(Begin(c), "-") << "the updates come first, as ever";
    }
    Reserve(c, generation, done += granted, 0);
  }
  EXPECT_EQ(order, "RRRER");
}

TEST_F(RunCoordinatorTest, KeepsOneRunIdAndOneSpecification) {
  RunCoordinator a(store_.get(), Alternate(5, 0, 1), clock_), b(store_.get(), Alternate(5, 0, 1), clock_);
  ASSERT_OK_AND_ASSIGN(const auto first, a.BeginEpisode("a", kSpec));
  ASSERT_OK_AND_ASSIGN(const auto second, b.BeginEpisode("b", kSpec));
  EXPECT_EQ(first->run_id, second->run_id);
  EXPECT_EQ(first->run_id.size(), 16u);
  EXPECT_EQ(second->episode_id, 2);
  EXPECT_THAT(b.BeginEpisode("c", kSpec + 1),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("00000000deadbef0 of actor c is not the run's, 00000000deadbeef")));
  EXPECT_THAT(b.BeginEpisode("", kSpec), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(b.BeginEpisode(std::string(129, 'x'), kSpec), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_OK(b.BeginEpisode("\xff not UTF-8, \"quoted\\", kSpec));
  EXPECT_OK(a.Progress());
  const std::unique_ptr<Store> other = MakeMemoryStore({}, clock_);
  RunCoordinator c(other.get(), Alternate(5, 0, 1), clock_);
  EXPECT_EQ(c.Progress()->run_id, "");
  EXPECT_OK(c.BeginEpisode("a", kSpec));
  EXPECT_THAT(c.Progress()->run_id, Ne(first->run_id));
  EXPECT_EQ(a.Progress()->run_id, first->run_id);
  EXPECT_EQ(a.Progress()->specification_hash, kSpec);
}

TEST_F(RunCoordinatorTest, CountsRowsOnceUpToTheHighest) {
  RunCoordinator c(store_.get(), Alternate(2, 0, 1), clock_);
  ASSERT_EQ(Begin(c), "R");
  const int64_t id = last_.episode_id;
  EXPECT_OK(c.RecordChunk(Rows(id, 0, 50)));
  EXPECT_OK(c.RecordChunk(Rows(id, 0, 50)));
  EXPECT_EQ(c.Progress()->rows_appended, 50);
  EXPECT_OK(c.RecordChunk(Rows(id, 50, 7, EpisodeEnd::kTerminated)));
  EXPECT_OK(c.RecordChunk(Rows(id, 50, 7, EpisodeEnd::kTerminated)));
  EXPECT_OK(c.RecordChunk(Rows(99, 0, 50)));
  EXPECT_EQ(c.Progress()->rows_appended, 57);
  EXPECT_EQ(c.Progress()->episodes_finished, 1);
}

TEST_F(RunCoordinatorTest, AnEpisodeWithoutNewsIsAbandoned) {
  config::v1::Experiment e = Alternate(1, 0, 1);
  e.mutable_collection()->set_lease_seconds(60);
  RunCoordinator c(store_.get(), e, clock_);
  ASSERT_EQ(Begin(c), "R");
  const int64_t id = last_.episode_id;
  EXPECT_EQ(Begin(c), "-");
  clock_.Advance(absl::Seconds(50));
  EXPECT_OK(c.RecordChunk(Rows(id, 0, 5)));
  clock_.Advance(absl::Seconds(50));
  EXPECT_OK(c.RenewLeases({id, 1234}));
  clock_.Advance(absl::Seconds(50));
  EXPECT_EQ(Begin(c), "-");
  EXPECT_EQ(c.Progress()->episodes_finished, 0);
  clock_.Advance(absl::Seconds(10));
  EXPECT_EQ(c.Progress()->episodes_finished, 1);
  EXPECT_EQ(Begin(c), "T");
  // News that come too late change nothing.
  EXPECT_OK(c.RecordChunk(Rows(id, 5, 5, EpisodeEnd::kTerminated)));
  EXPECT_OK(c.RenewLeases({id}));
  EXPECT_EQ(c.Progress()->rows_appended, 5);
  EXPECT_EQ(c.Progress()->episodes_finished, 1);
}

TEST_F(RunCoordinatorTest, AQuestionThatIsAskedAgainGetsTheSameEpisode) {
  config::v1::Experiment e = Alternate(2, 0, 0);
  for (const char* name : {"a", "b"}) e.mutable_environment()->add_tasks()->set_name(name);
  e.mutable_evaluation()->set_every_episodes(1);
  e.mutable_evaluation()->set_episodes(2);
  e.mutable_learning()->set_max_episodes(4);
  RunCoordinator c(store_.get(), e, clock_);
  std::string order;
  for (int i = 0; i < 12; ++i) {
    const std::string question = absl::StrCat("\"question\\\n", i);
    const Answer first = c.BeginEpisode("actor", kSpec, question);
    EXPECT_EQ(Number(first), i + 1);
    EXPECT_EQ(Fields(c.BeginEpisode("actor", kSpec, question)), Fields(first));
    // Another replica knows it from the store.
    RunCoordinator other(store_.get(), e, clock_);
    EXPECT_EQ(Fields(other.BeginEpisode("actor", kSpec, question)), Fields(first));
    order += " RTE"[static_cast<int>(std::get<EpisodeMode>(Fields(first)))] + std::get<3>(Fields(first)) + " ";
    EXPECT_OK(other.RecordChunk(Rows(i + 1, 0, 5, EpisodeEnd::kTruncated)));
  }
  EXPECT_EQ(order, "Ra Rb Ta Ea Eb Ea Eb Tb Ea Eb Ea Eb ");
  EXPECT_TRUE(std::get<bool>(Fields(c.BeginEpisode("actor", kSpec, "one more"))));
}

TEST_F(RunCoordinatorTest, AnotherQuestionGetsAnotherEpisode) {
  config::v1::Experiment e = Alternate(5, 0, 1);
  e.mutable_learning()->set_max_episodes(5);
  RunCoordinator c(store_.get(), e, clock_);
  const auto ask = [&](const std::string& actor, const std::string& question) {
    return Number(c.BeginEpisode(actor, kSpec, question));
  };
  EXPECT_EQ(ask("one", "a"), 1);
  EXPECT_EQ(ask("one", "b"), 2);
  EXPECT_EQ(ask("two", "a"), 3);
  EXPECT_EQ(ask("one", ""), 4);
  EXPECT_EQ(ask("one", ""), 5);
  EXPECT_TRUE(std::get<bool>(Fields(c.BeginEpisode("one", kSpec, "c"))));
  EXPECT_EQ(ask("one", "b"), 2) << "it is still to be played";
  EXPECT_EQ(c.Progress()->episodes_started, 5);
  EXPECT_OK(c.BeginEpisode("one", kSpec, std::string(64, 'x')));
  EXPECT_THAT(c.BeginEpisode("one", kSpec, std::string(65, 'x')),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("request_id has 65 bytes, expected at most 64")));
}

TEST_F(RunCoordinatorTest, AnEpisodeThatHasRowsIsNotHandedOutAgain) {
  RunCoordinator c(store_.get(), Alternate(5, 0, 1), clock_), other(store_.get(), Alternate(5, 0, 1), clock_);
  EXPECT_EQ(Number(c.BeginEpisode("actor", kSpec, "a")), 1);
  EXPECT_OK(c.RecordChunk(Rows(1, 0, 5)));  // noted, not yet written
  EXPECT_EQ(Number(c.BeginEpisode("actor", kSpec, "a")), 2);
  EXPECT_OK(c.RecordChunk(Rows(2, 0, 5, EpisodeEnd::kTruncated)));
  EXPECT_EQ(Number(other.BeginEpisode("actor", kSpec, "a")), 3);
}

TEST_F(RunCoordinatorTest, AskingAgainRenewsTheLease) {
  config::v1::Experiment e = Alternate(2, 0, 1);
  e.mutable_collection()->set_lease_seconds(60);
  RunCoordinator c(store_.get(), e, clock_);
  ASSERT_OK(c.BeginEpisode("actor", kSpec, "a"));
  const int64_t version = store_->Get("run")->version;
  for (int i = 0; i < 3; ++i) ASSERT_OK(c.BeginEpisode("actor", kSpec, "a"));
  EXPECT_EQ(store_->Get("run")->version, version) << "not every question is a write";
  clock_.Advance(absl::Seconds(50));
  EXPECT_EQ(Number(c.BeginEpisode("actor", kSpec, "a")), 1);
  clock_.Advance(absl::Seconds(50));
  EXPECT_EQ(c.Progress()->episodes_finished, 0);
  clock_.Advance(absl::Seconds(10));
  EXPECT_EQ(Number(c.BeginEpisode("actor", kSpec, "a")), 2) << "the first one's lease has ended";
  EXPECT_EQ(c.Progress()->episodes_finished, 1);
}

TEST_F(RunCoordinatorTest, AnUnansweredQuestionHoldsItsTurnForWhoAsksItAgain) {
  config::v1::Experiment e = Alternate(1, 0, 0);
  RunCoordinator c(store_.get(), e, clock_);
  Play(c);
  const Answer first = c.BeginEpisode("one", kSpec, "a");
  EXPECT_EQ(std::get<EpisodeMode>(Fields(first)), EpisodeMode::kTrain);
  EXPECT_EQ(Number(c.BeginEpisode("two", kSpec, "b")), 0);
  EXPECT_EQ(Number(c.BeginEpisode("one", kSpec, "b")), 0);
  EXPECT_EQ(Fields(c.BeginEpisode("one", kSpec, "a")), Fields(first));
  EXPECT_OK(c.RecordChunk(Rows(2, 0, 5, EpisodeEnd::kTruncated)));
  EXPECT_EQ(Number(c.BeginEpisode("two", kSpec, "b")), 3);
}

// A try that comes late: its question was answered to a later try, and that episode is over.
TEST_F(RunCoordinatorTest, WhoDoesNotWaitAnyMoreGetsNothing) {
  WatchedStore store(store_.get());
  RunCoordinator c(&store, Alternate(5, 0, 1), clock_);
  std::atomic<bool> waits = true;
  const auto check = [&] { return waits ? absl::OkStatus() : absl::CancelledError("gone"); };
  EXPECT_EQ(Number(c.BeginEpisode("actor", kSpec, "a", check)), 1);
  EXPECT_OK(c.RecordChunk(Rows(1, 0, 5, EpisodeEnd::kTruncated)));
  Answer late;
  const auto other = [&] { EXPECT_OK(c.BeginEpisode("other", kSpec)); };
  const auto ask_late = [&] { late = c.BeginEpisode("actor", kSpec, "a", check); };
  const auto go = [&] {
    waits = false;
    other();
  };
  Together(c, store, {other, ask_late, go});
  EXPECT_THAT(late, StatusIs(absl::StatusCode::kCancelled, HasSubstr("gone")));
  EXPECT_EQ(c.Progress()->episodes_started, 3);
}

TEST_F(RunCoordinatorTest, ReadsAStateWithoutQuestions) {
  config::v1::Experiment e = Alternate(5, 0, 1);
  e.mutable_environment()->set_task("reach");
  nlohmann::json state;
  const auto read = [&] { state = nlohmann::json::parse(store_->Get("run")->value); };
  const auto request = [](const std::string& id, int64_t i) {
    return nlohmann::json{{"id", id}, {"task", "reach"}, {"seed", DeriveSeed(7, "environment", i)}};
  };
  {
    RunCoordinator c(store_.get(), e, clock_);
    ASSERT_OK(c.BeginEpisode("actor", kSpec, "a"));
    ASSERT_OK(c.BeginEpisode("actor", kSpec, "b"));
    ASSERT_OK(c.BeginEpisode("actor", kSpec));
    read();
    EXPECT_EQ(state["running"][0]["request"], request("a", 0));
    EXPECT_EQ(state["running"][1]["request"], request("b", 1));
    EXPECT_FALSE(state["running"][2].contains("request"));
    EXPECT_OK(c.RecordChunk(Rows(2, 0, 5)));
    EXPECT_OK(c.WriteRows());
    read();
    EXPECT_TRUE(state["running"][0].contains("request"));
    EXPECT_FALSE(state["running"][1].contains("request")) << "that has rows";
  }
  for (nlohmann::json& episode : state["running"]) episode.erase("request");  // as an earlier release writes it
  EXPECT_OK(store_->CompareAndSet("run", store_->Get("run")->version, state.dump()));
  RunCoordinator c(store_.get(), e, clock_);
  EXPECT_EQ(Number(c.BeginEpisode("actor", kSpec, "a")), 4);
  for (int i = 1; i <= 4; ++i) EXPECT_OK(c.RecordChunk(Rows(i, 0, 5, EpisodeEnd::kTruncated)));
  EXPECT_EQ(c.Progress()->episodes_finished, 4);
}

TEST_F(RunCoordinatorTest, OneLearnerAtATime) {
  RunCoordinator a(store_.get(), Alternate(1, 5, 5), clock_), b(store_.get(), Alternate(1, 5, 5), clock_);
  EXPECT_THAT(a.ReserveUpdates(0, 0, 1), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(a.AcquireLearner("one"), IsOkAndHolds(1));
  EXPECT_THAT(b.AcquireLearner("one"), IsOkAndHolds(1));
  EXPECT_THAT(b.AcquireLearner("two"), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("'one' holds the run for another 30s")));
  clock_.Advance(absl::Seconds(25));
  EXPECT_EQ(Reserve(b, 1, 0, 1), 0);  // renews
  clock_.Advance(absl::Seconds(25));
  EXPECT_THAT(b.AcquireLearner("two"), StatusIs(absl::StatusCode::kAlreadyExists));
  clock_.Advance(absl::Seconds(5));
  EXPECT_THAT(b.AcquireLearner("two"), IsOkAndHolds(2));
  EXPECT_THAT(a.ReserveUpdates(1, 0, 1), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("generation 2 (two)")));
  EXPECT_OK(a.ReserveUpdates(2, 0, 1));
  EXPECT_THAT(a.ReserveUpdates(2, -1, 1), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(a.ReserveUpdates(2, 0, -1), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(a.AcquireLearner(""), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(RunCoordinatorTest, ALearnerThatEndsLetsAnotherOneIn) {
  RunCoordinator c(store_.get(), Alternate(1, 5, 5), clock_);
  const int64_t first = *c.AcquireLearner("one");
  EXPECT_THAT(c.ReleaseLearner(first + 1, 0), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(c.AcquireLearner("two"), StatusIs(absl::StatusCode::kAlreadyExists)) << "a stranger released nothing";
  ASSERT_OK(c.ReleaseLearner(first, 3));
  EXPECT_EQ(c.Progress()->updates_done, 3);
  ASSERT_OK(c.ReleaseLearner(first, 3)) << "the answer was lost";
  EXPECT_THAT(c.ReserveUpdates(first, 0, 5), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("released")))
      << "a question from before";
  EXPECT_EQ(c.Progress()->updates_done, 3);
  EXPECT_THAT(c.AcquireLearner("two"), IsOkAndHolds(first + 1));
  EXPECT_THAT(c.ReleaseLearner(first, 3), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(c.AcquireLearner("three"), StatusIs(absl::StatusCode::kAlreadyExists));
}

TEST_F(RunCoordinatorTest, RowsThatWaitAreWrittenWhenAStreamEnds) {
  RunCoordinator c(store_.get(), Concurrent(10, 1, 1e6), clock_), other(store_.get(), Concurrent(10, 1, 1e6), clock_);
  ASSERT_EQ(Begin(c), "R");
  ASSERT_OK(c.RecordChunk(Rows(last_.episode_id, 0, 10)));
  ASSERT_OK(c.RecordChunk(Rows(last_.episode_id, 10, 10)));
  EXPECT_LT(other.Progress()->rows_appended, 20);
  ASSERT_OK(c.WriteRows());
  EXPECT_EQ(other.Progress()->rows_appended, 20);
  const int64_t version = store_->Get("run")->version;
  ASSERT_OK(c.WriteRows());
  EXPECT_EQ(store_->Get("run")->version, version);
}

TEST_F(RunCoordinatorTest, EndsWithTheUpdatesThatWereAskedFor) {
  config::v1::Experiment e = Concurrent(1, 1, 1e6);
  e.mutable_learning()->set_max_updates(8);
  RunCoordinator c(store_.get(), e, clock_);
  const int64_t generation = *c.AcquireLearner("learner");
  EXPECT_EQ(Play(c), "R");
  EXPECT_EQ(Play(c), "T");
  Reserve(c, generation, 7, 5);
  EXPECT_EQ(Play(c), "T");
  ASSERT_OK(c.ReleaseLearner(generation, 8));
  EXPECT_EQ(Begin(c), ".");
}

TEST_F(RunCoordinatorTest, ALearnerThatFellBackOwesItsUpdatesAgain) {
  RunCoordinator c(store_.get(), Alternate(1, 5, 5), clock_);
  const int64_t generation = *c.AcquireLearner("one");
  Play(c);
  EXPECT_EQ(Reserve(c, generation, 0, 100), 5);
  EXPECT_EQ(Reserve(c, generation, 5, 100), 0);
  EXPECT_EQ(Reserve(c, generation, 2, 100), 3);
  EXPECT_EQ(Begin(c), "-");
  EXPECT_EQ(Reserve(c, generation, 5, 0), 0);
  EXPECT_EQ(Begin(c), "T");
}

TEST_F(RunCoordinatorTest, WithoutSeedEpisodesCollectingComesFirst) {
  config::v1::Experiment e = Alternate(0, 0, 3);
  e.mutable_learning()->clear_initial_updates();
  RunCoordinator c(store_.get(), e, clock_);
  const int64_t generation = *c.AcquireLearner("one");
  EXPECT_EQ(Reserve(c, generation, 0, 100), 0);
  EXPECT_EQ(Play(c), "T");
  EXPECT_EQ(Play(c), "-");
  EXPECT_EQ(Reserve(c, generation, 0, 100), 3);
}

TEST_F(RunCoordinatorTest, EndsWithinTheSeedEpisodes) {
  config::v1::Experiment e = Alternate(5, 10, 10);
  e.mutable_learning()->set_max_episodes(2);
  e.mutable_evaluation()->set_every_episodes(1);
  RunCoordinator c(store_.get(), e, clock_);
  const int64_t generation = *c.AcquireLearner("one");
  EXPECT_EQ(Joined({Play(c), Begin(c), Begin(c)}), "RR.");
  EXPECT_EQ(Reserve(c, generation, 0, 10), 0);
  EXPECT_FALSE(complete_);
  Finish(c);
  EXPECT_EQ(Reserve(c, generation, 0, 10), 0);
  EXPECT_TRUE(complete_);
}

TEST_F(RunCoordinatorTest, ConcurrentHoldsUpdatesPerRowInsideTheBand) {
  RunCoordinator c(store_.get(), Concurrent(1, 0.5, 20), clock_);
  const int64_t generation = *c.AcquireLearner("one");
  ASSERT_EQ(Begin(c), "R");
  const int64_t seed_episode = last_.episode_id;
  EXPECT_OK(c.RecordChunk(Rows(seed_episode, 0, 40)));
  EXPECT_EQ(Reserve(c, generation, 0, 1000), 0);  // seeding
  EXPECT_EQ(Begin(c), "-");
  EXPECT_OK(c.RecordChunk(Rows(seed_episode, 40, 10, EpisodeEnd::kTruncated)));
  EXPECT_EQ(Reserve(c, generation, 0, 1000), 45);  // 0.5 * 50 + 20
  EXPECT_EQ(Reserve(c, generation, 40, 3), 3);
  EXPECT_EQ(Reserve(c, generation, 45, 1000), 0);
  // Collecting may run ahead by 20 updates = 40 rows beyond what has been learned since seeding.
  EXPECT_EQ(Play(c, 40), "T");
  Reserve(c, generation, 0, 0);  // as if it had fallen back
  EXPECT_EQ(Play(c, 2), "T");
  EXPECT_EQ(Begin(c), "-");
  EXPECT_EQ(Reserve(c, generation, 1, 1000), 65);  // floor(0.5 * 92 + 20) - 1
  EXPECT_EQ(Begin(c), "T");
}

TEST_F(RunCoordinatorTest, AnAbsentSideDoesNotBlockTheOther) {
  config::v1::Experiment e = Concurrent(1, 1, 10);
  e.mutable_replay()->mutable_limiter()->set_absent_seconds(60);
  e.mutable_collection()->set_lease_seconds(600);
  RunCoordinator c(store_.get(), e, clock_);
  const int64_t generation = *c.AcquireLearner("one");
  EXPECT_EQ(Joined({Play(c, 50), Play(c, 50)}), "RT");
  EXPECT_EQ(Begin(c), "-");
  clock_.Advance(absl::Seconds(40));
  Reserve(c, generation, 0, 0);  // here, but behind
  clock_.Advance(absl::Seconds(40));
  EXPECT_EQ(Begin(c), "-");
  clock_.Advance(absl::Seconds(20));
  EXPECT_EQ(Begin(c), "T");
  // The other way round: the learner is held by actors that are there, not by those that left.
  EXPECT_EQ(Reserve(c, generation, 110, 1000), 0);
  clock_.Advance(absl::Seconds(59));
  EXPECT_OK(c.RenewLeases({last_.episode_id}));
  clock_.Advance(absl::Seconds(59));
  EXPECT_EQ(Reserve(c, generation, 110, 1000), 0);
  clock_.Advance(absl::Seconds(1));
  EXPECT_EQ(Reserve(c, generation, 110, 1000), 1000);
}

TEST_F(RunCoordinatorTest, ConcurrentEndsWithTheUpdatesThatBelongToTheRows) {
  config::v1::Experiment e = Concurrent(1, 0.5, 20);
  e.mutable_learning()->set_max_episodes(2);
  e.mutable_evaluation()->set_every_episodes(1);
  e.mutable_evaluation()->set_episodes(1);
  RunCoordinator c(store_.get(), e, clock_);
  const int64_t generation = *c.AcquireLearner("one");
  EXPECT_EQ(Joined({Play(c, 30), Play(c, 31), Begin(c), Begin(c)}), "RTE.");
  EXPECT_EQ(Reserve(c, generation, 0, 1000), 30);
  EXPECT_EQ(Reserve(c, generation, 30, 1000), 0);
  EXPECT_FALSE(complete_) << "the evaluation is still running";
  Finish(c);
  EXPECT_EQ(Reserve(c, generation, 29, 1000), 1);
  EXPECT_FALSE(complete_);
  EXPECT_EQ(Reserve(c, generation, 30, 1000), 0);
  EXPECT_TRUE(complete_);
  EXPECT_EQ(c.Progress()->rows_appended, 61) << "evaluation rows do not count";
}

TEST_F(RunCoordinatorTest, RepeatedQuestionsWriteNothing) {
  RunCoordinator c(store_.get(), Alternate(1, 5, 5), clock_);
  const int64_t generation = *c.AcquireLearner("one");
  Begin(c);
  EXPECT_OK(c.Progress());
  const int64_t version = store_->Get("run")->version;
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Begin(c), "-");
    EXPECT_EQ(Reserve(c, generation, 0, 5), 0);
    EXPECT_OK(c.RenewLeases({last_.episode_id}));
    EXPECT_OK(c.Progress());
  }
  EXPECT_EQ(store_->Get("run")->version, version);
}

TEST_F(RunCoordinatorTest, ReportsADamagedState) {
  for (const char* text : {"", "{", "[]", R"({"run_id": 5})"}) {
    const std::unique_ptr<Store> store = MakeMemoryStore({}, clock_);
    EXPECT_OK(store->CompareAndSet("run", 0, text));
    RunCoordinator c(store.get(), Alternate(1, 5, 5), clock_);
    EXPECT_THAT(c.BeginEpisode("a", kSpec), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("value 'run'")));
  }
}

// Eight threads over three coordinators, each lost reply included: every episode is handed out at most once and counted once.
TEST_F(RunCoordinatorTest, ManyActorsOverManyReplicasAndLostReplies) {
  config::v1::Experiment e = Concurrent(10, 1, 1e6);
  e.mutable_learning()->set_max_episodes(100);
  e.mutable_collection()->set_lease_seconds(60);
  FaultStore faulty(store_.get(), 17);
  std::vector<std::unique_ptr<RunCoordinator>> replicas;
  for (int i = 0; i < 3; ++i) replicas.push_back(std::make_unique<RunCoordinator>(&faulty, e, clock_));
  absl::Mutex mu;
  std::map<int64_t, EpisodeMode> played;
  std::set<uint64_t> seeds;
  std::vector<std::thread> actors;
  for (int i = 0; i < 8; ++i) {
    actors.emplace_back([&, i] {
      RunCoordinator& c = *replicas[i % replicas.size()];
      while (true) {
        const auto episode = c.BeginEpisode(absl::StrCat("actor ", i), kSpec);
        if (!episode.ok() || !episode->has_value()) {
          std::this_thread::yield();
          continue;
        }
        if ((*episode)->run_complete) return;
        {
          absl::MutexLock lock(&mu);
          EXPECT_TRUE(played.emplace((*episode)->episode_id, (*episode)->mode).second);
          EXPECT_TRUE(seeds.insert((*episode)->seed).second);
        }
        for (int row = 0; row < 30; row += 10) {
          const ChunkInfo info = Rows((*episode)->episode_id, row, 10, row == 20 ? EpisodeEnd::kTerminated : EpisodeEnd::kContinues);
          while (!c.RecordChunk(info).ok()) {
          }
        }
      }
    });
  }
  for (std::thread& actor : actors) actor.join();
  EXPECT_GT(faulty.faults(), 10);
  RunCoordinator c(store_.get(), e, clock_);
  clock_.Advance(absl::Seconds(61));
  ASSERT_OK_AND_ASSIGN(const RunProgress progress, c.Progress());
  EXPECT_EQ(progress.episodes_started, 100);
  EXPECT_EQ(progress.episodes_finished, 100);
  // A lost reply is recognised unless reading it back fails too or another write came between: few are abandoned.
  EXPECT_GT(played.size(), 80u);
  EXPECT_EQ(progress.rows_appended, 30 * static_cast<int64_t>(played.size()));
  int random = 0;
  for (const auto& [id, mode] : played) random += mode == EpisodeMode::kRandom;
  EXPECT_LE(random, 10);
  EXPECT_GE(random, 5);
}

TEST_F(RunCoordinatorTest, ThreadsShareAWrite) {
  WatchedStore store(store_.get());
  RunCoordinator c(&store, Alternate(1000, 0, 1), clock_);
  absl::Mutex mu;
  std::set<int64_t> episodes;
  const auto begin = [&] {
    const auto episode = c.BeginEpisode("actor", kSpec);
    ASSERT_OK(episode);
    ASSERT_TRUE(episode->has_value());
    absl::MutexLock lock(&mu);
    EXPECT_TRUE(episodes.insert((*episode)->episode_id).second);
  };
  Together(c, store, std::vector<std::function<void()>>(40, begin));
  EXPECT_EQ(store.writes, 2);
  EXPECT_EQ(episodes.size(), 40u);
  EXPECT_EQ(*episodes.rbegin(), 40);
  RunCoordinator b(store_.get(), Alternate(1000, 0, 1), clock_);
  EXPECT_EQ(b.Progress()->episodes_started, 40);
}

TEST_F(RunCoordinatorTest, ACallThatFailsDoesNotDisturbThoseBesideIt) {
  WatchedStore store(store_.get());
  RunCoordinator c(&store, Alternate(1000, 0, 1), clock_);
  std::atomic<int> acquired = 0, held = 0;
  const auto begin = [&] { EXPECT_OK(c.BeginEpisode("actor", kSpec)); };
  const auto begin_another = [&] {
    EXPECT_THAT(c.BeginEpisode("actor", kSpec + 1), StatusIs(absl::StatusCode::kFailedPrecondition));
  };
  const auto acquire = [&](const char* learner) {
    const auto generation = c.AcquireLearner(learner);
    if (generation.ok()) {
      ++acquired;
    } else {
      ++held;
      EXPECT_THAT(generation, StatusIs(absl::StatusCode::kAlreadyExists));
    }
  };
  const auto reserve = [&] { EXPECT_THAT(c.ReserveUpdates(9, 77, 1), StatusIs(absl::StatusCode::kFailedPrecondition)); };
  Together(c, store, {begin, begin_another, [&] { acquire("one"); }, begin, reserve, [&] { acquire("two"); }, begin});
  EXPECT_EQ(store.writes, 2);
  EXPECT_EQ(acquired, 1);
  EXPECT_EQ(held, 1);
  RunCoordinator b(store_.get(), Alternate(1000, 0, 1), clock_);
  ASSERT_OK_AND_ASSIGN(const RunProgress progress, b.Progress());
  EXPECT_EQ(progress.episodes_started, 3);
  EXPECT_EQ(progress.updates_done, 0);
  EXPECT_EQ(progress.specification_hash, kSpec);
  EXPECT_OK(b.ReserveUpdates(1, 0, 1));
}

TEST_F(RunCoordinatorTest, AWriteThatFailsFailsAllThatWereInIt) {
  WatchedStore store(store_.get());
  RunCoordinator c(&store, Alternate(1000, 0, 1), clock_);
  std::atomic<int> begun = 0, failed = 0;
  const auto begin = [&] {
    const auto episode = c.BeginEpisode("actor", kSpec);
    if (episode.ok()) {
      ++begun;
    } else {
      ++failed;
      EXPECT_THAT(episode, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("full")));
    }
  };
  Together(c, store, std::vector<std::function<void()>>(10, begin), [](int) { return absl::ResourceExhaustedError("full"); });
  EXPECT_EQ(begun, 1);
  EXPECT_EQ(failed, 9);
  ASSERT_EQ(Begin(c), "R");
  EXPECT_EQ(last_.episode_id, 2);
  EXPECT_EQ(c.Progress()->episodes_started, 2);
}

TEST_F(RunCoordinatorTest, CallsAreRepeatedTogetherWhenAnotherReplicaWasFirst) {
  WatchedStore store(store_.get());
  RunCoordinator c(&store, Alternate(1000, 0, 1), clock_), b(store_.get(), Alternate(1000, 0, 1), clock_);
  absl::Mutex mu;
  std::set<int64_t> episodes;
  const auto begin_at = [&](RunCoordinator& at) {
    const auto episode = at.BeginEpisode("actor", kSpec);
    ASSERT_OK(episode);
    ASSERT_TRUE(episode->has_value());
    absl::MutexLock lock(&mu);
    EXPECT_TRUE(episodes.insert((*episode)->episode_id).second);
  };
  Together(c, store, std::vector<std::function<void()>>(10, [&] { begin_at(c); }), [&](int n) {
    if (n == 1) begin_at(b);
    return absl::OkStatus();
  });
  EXPECT_EQ(store.writes, 3);
  EXPECT_EQ(episodes.size(), 11u);
  EXPECT_EQ(*episodes.rbegin(), 11);
  EXPECT_EQ(b.Progress()->episodes_started, 11);
}

TEST_F(RunCoordinatorTest, RowsOfAnEpisodeThatGoesOnAreWrittenAfterAWhile) {
  WatchedStore store(store_.get());
  RunCoordinator a(&store, Alternate(2, 0, 1), clock_), b(store_.get(), Alternate(2, 0, 1), clock_);
  ASSERT_EQ(Begin(a), "R");
  const int64_t id = last_.episode_id;
  EXPECT_EQ(store.writes, 1);
  EXPECT_OK(a.RecordChunk(Rows(id, 0, 10)));
  EXPECT_EQ(a.Progress()->rows_appended, 10);
  EXPECT_EQ(b.Progress()->rows_appended, 0);
  clock_.Advance(absl::Milliseconds(99));
  EXPECT_OK(a.RecordChunk(Rows(id, 10, 10)));
  EXPECT_EQ(a.Progress()->rows_appended, 20);
  EXPECT_EQ(store.writes, 1);
  clock_.Advance(absl::Milliseconds(1));
  EXPECT_OK(a.RecordChunk(Rows(id, 20, 5)));
  EXPECT_EQ(store.writes, 2);
  EXPECT_EQ(b.Progress()->rows_appended, 25);
  // Any other call writes them as well; what is there already is not written again.
  for (const int32_t rows : {30, 30}) {
    EXPECT_OK(a.RecordChunk(Rows(id, 0, rows)));
    clock_.Advance(absl::Milliseconds(100));
    EXPECT_OK(a.RenewLeases({id}));
    EXPECT_EQ(store.writes, 3);
    EXPECT_EQ(b.Progress()->rows_appended, 30);
  }
}

TEST_F(RunCoordinatorTest, RowsGoWithWhateverIsWritten) {
  RunCoordinator a(store_.get(), Alternate(3, 0, 1), clock_), b(store_.get(), Alternate(3, 0, 1), clock_);
  ASSERT_EQ(Begin(a), "R");
  const int64_t first = last_.episode_id;
  EXPECT_OK(a.RecordChunk(Rows(first, 0, 10)));
  ASSERT_EQ(Begin(a), "R");
  EXPECT_EQ(b.Progress()->rows_appended, 10);
  EXPECT_OK(a.RecordChunk(Rows(last_.episode_id, 0, 7)));
  EXPECT_EQ(b.Progress()->rows_appended, 10);
  EXPECT_OK(a.RecordChunk(Rows(first, 10, 5, EpisodeEnd::kTerminated)));  // an end does not wait
  EXPECT_EQ(b.Progress()->rows_appended, 22);
  EXPECT_EQ(b.Progress()->episodes_finished, 1);
}

TEST_F(RunCoordinatorTest, ALearnerGetsUpdatesForRowsThatAreNotWrittenYet) {
  WatchedStore store(store_.get());
  RunCoordinator c(&store, Concurrent(0, 0.5, 20), clock_);
  const int64_t generation = *c.AcquireLearner("one");
  ASSERT_EQ(Begin(c), "T");
  const int writes = store.writes;
  EXPECT_EQ(Reserve(c, generation, 0, 1000), 0);
  EXPECT_OK(c.RecordChunk(Rows(last_.episode_id, 0, 10)));
  EXPECT_EQ(Reserve(c, generation, 0, 1000), 25);
  EXPECT_EQ(store.writes, writes);
}

TEST_F(RunCoordinatorTest, AChunkThatRenewsTheLeaseIsWrittenAtOnce) {
  config::v1::Experiment e = Alternate(1, 0, 1);
  e.mutable_collection()->set_lease_seconds(60);
  RunCoordinator a(store_.get(), e, clock_), b(store_.get(), e, clock_);
  ASSERT_EQ(Begin(a), "R");
  const int64_t id = last_.episode_id;
  const int64_t version = store_->Get("run")->version;
  clock_.Advance(absl::Seconds(19));
  EXPECT_OK(a.RecordChunk(Rows(id, 0, 5)));
  EXPECT_OK(a.RenewLeases({id}));
  EXPECT_EQ(store_->Get("run")->version, version) << "a third of the lease has not gone by";
  clock_.Advance(absl::Seconds(31));
  EXPECT_OK(a.RecordChunk(Rows(id, 5, 5)));
  clock_.Advance(absl::Seconds(59));
  EXPECT_EQ(b.Progress()->episodes_finished, 0);
  EXPECT_EQ(b.Progress()->rows_appended, 10);
  clock_.Advance(absl::Seconds(1));
  EXPECT_EQ(b.Progress()->episodes_finished, 1);
}

TEST_F(RunCoordinatorTest, ActorsAreSeenEvenWhenTheirLeasesAreLong) {
  config::v1::Experiment e = Concurrent(1, 1, 10);
  e.mutable_replay()->mutable_limiter()->set_absent_seconds(60);
  e.mutable_collection()->set_lease_seconds(6000);
  RunCoordinator a(store_.get(), e, clock_), b(store_.get(), e, clock_);
  const int64_t generation = *b.AcquireLearner("one");
  EXPECT_EQ(Play(a, 50), "R");
  ASSERT_EQ(Begin(a), "T");
  clock_.Advance(absl::Seconds(50));
  EXPECT_OK(a.RecordChunk(Rows(last_.episode_id, 0, 5)));
  clock_.Advance(absl::Seconds(50));
  EXPECT_EQ(Reserve(b, generation, 65, 1000), 0);
  clock_.Advance(absl::Seconds(10));
  EXPECT_EQ(Reserve(b, generation, 65, 1000), 1000);
}

TEST_F(RunCoordinatorTest, TheNextChunkMakesUpForAReplicaThatDied) {
  config::v1::Experiment e = Alternate(2, 0, 1);
  e.mutable_collection()->set_lease_seconds(60);
  auto a = std::make_unique<RunCoordinator>(store_.get(), e, clock_);
  RunCoordinator b(store_.get(), e, clock_);
  ASSERT_EQ(Begin(*a), "R");
  clock_.Advance(absl::Seconds(15));
  EXPECT_OK(a->RecordChunk(Rows(last_.episode_id, 0, 10)));
  a.reset();
  EXPECT_EQ(b.Progress()->rows_appended, 0);
  clock_.Advance(absl::Seconds(39));  // two thirds of a lease after the last news
  EXPECT_OK(b.RecordChunk(Rows(last_.episode_id, 10, 10, EpisodeEnd::kTerminated)));
  EXPECT_EQ(b.Progress()->rows_appended, 20);
  EXPECT_EQ(b.Progress()->episodes_finished, 1);
}

TEST_F(RunCoordinatorTest, AFailedWriteKeepsTheRows) {
  WatchedStore store(store_.get());
  RunCoordinator a(&store, Alternate(2, 0, 1), clock_), b(store_.get(), Alternate(2, 0, 1), clock_);
  ASSERT_EQ(Begin(a), "R");
  const int64_t id = last_.episode_id;
  EXPECT_OK(a.RecordChunk(Rows(id, 0, 10)));
  clock_.Advance(absl::Milliseconds(100));
  store.before_write = [](int) { return absl::UnavailableError("away"); };
  EXPECT_THAT(a.RenewLeases({id}), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(a.RecordChunk(Rows(id, 0, 5)), StatusIs(absl::StatusCode::kUnavailable)) << "still due";
  EXPECT_EQ(b.Progress()->rows_appended, 0);
  store.before_write = nullptr;
  EXPECT_OK(a.RenewLeases({id}));
  EXPECT_EQ(b.Progress()->rows_appended, 10);
}

TEST_F(RunCoordinatorTest, RowsOfAnEpisodeThatAnotherReplicaEndedAreDropped) {
  RunCoordinator a(store_.get(), Alternate(2, 0, 1), clock_), b(store_.get(), Alternate(2, 0, 1), clock_);
  ASSERT_EQ(Begin(a), "R");
  const int64_t id = last_.episode_id;
  EXPECT_OK(a.RecordChunk(Rows(id, 0, 40)));
  EXPECT_OK(b.RecordChunk(Rows(id, 0, 30, EpisodeEnd::kTerminated)));
  const int64_t version = store_->Get("run")->version;
  EXPECT_EQ(a.Progress()->rows_appended, 30);
  clock_.Advance(absl::Milliseconds(100));
  EXPECT_OK(a.RenewLeases({id}));
  EXPECT_OK(a.RecordChunk(Rows(id, 0, 50)));
  EXPECT_EQ(a.Progress()->rows_appended, 30);
  EXPECT_EQ(store_->Get("run")->version, version);
}

TEST_F(RunCoordinatorTest, AClockThatIsSetBackDelaysNothing) {
  config::v1::Experiment e = Alternate(2, 0, 1);
  e.mutable_collection()->set_lease_seconds(60);
  FakeClock local(absl::FromUnixSeconds(1000000));
  RunCoordinator a(store_.get(), e, local), b(store_.get(), e, clock_);
  ASSERT_EQ(Begin(a), "R");
  const int64_t id = last_.episode_id;
  EXPECT_OK(a.RecordChunk(Rows(id, 0, 10)));
  local.Advance(-absl::Hours(1));
  EXPECT_OK(a.RenewLeases({id}));
  EXPECT_EQ(b.Progress()->rows_appended, 10);
  local.Advance(-absl::Hours(1));
  clock_.Advance(absl::Seconds(50));
  EXPECT_OK(a.RenewLeases({id}));
  clock_.Advance(absl::Seconds(50));
  EXPECT_EQ(b.Progress()->episodes_finished, 0);
}

TEST_F(RunCoordinatorTest, TheStateIsSentOnlyWhenAnotherReplicaChangedIt) {
  WatchedStore store(store_.get());
  RunCoordinator a(&store, Alternate(1000, 0, 1), clock_), b(store_.get(), Alternate(1000, 0, 1), clock_);
  for (int i = 0; i < 5; ++i) ASSERT_EQ(Begin(a), "R");
  EXPECT_EQ(store.values_sent, 1) << "there was none yet";
  ASSERT_EQ(Begin(b), "R");
  EXPECT_EQ(last_.episode_id, 6);
  for (int id = 7; id < 10; ++id) {
    ASSERT_EQ(Begin(a), "R");
    EXPECT_EQ(last_.episode_id, id);
    EXPECT_EQ(a.Progress()->episodes_started, id);
  }
  EXPECT_EQ(store.values_sent, 2);
}

// After a failover as many changes may have been made as were seen before, but others.
TEST_F(RunCoordinatorTest, NoticesAnotherStateAfterAsManyChanges) {
  const std::unique_ptr<Store> other = MakeMemoryStore({}, clock_);
  WatchedStore store(store_.get());
  RunCoordinator a(&store, Alternate(5, 0, 1), clock_), b(other.get(), Alternate(5, 0, 1), clock_);
  ASSERT_EQ(Begin(a), "R");
  ASSERT_EQ(Begin(b), "R");
  store.target = other.get();
  ASSERT_EQ(Begin(a), "R");
  EXPECT_EQ(last_.episode_id, 2);
  EXPECT_EQ(last_.run_id, b.Progress()->run_id);
}

TEST_F(RunCoordinatorTest, DoesNotOverwriteAnotherStateThatComesWhileItWrites) {
  const std::unique_ptr<Store> other = MakeMemoryStore({}, clock_);
  WatchedStore store(store_.get());
  RunCoordinator a(&store, Alternate(5, 0, 1), clock_), b(other.get(), Alternate(5, 0, 1), clock_);
  ASSERT_EQ(Begin(a), "R");
  ASSERT_EQ(Begin(b), "R");
  const std::string run_of_b = last_.run_id;
  store.before_write = [&](int n) {
    if (n == 2) store.target = other.get();
    return absl::OkStatus();
  };
  ASSERT_EQ(Begin(a), "R");
  EXPECT_EQ(last_.run_id, run_of_b);
  EXPECT_EQ(last_.episode_id, 2);
  EXPECT_EQ(b.Progress()->episodes_started, 2);
}

TEST_F(RunCoordinatorTest, GoesOnWithARunThatWasPlayedElsewhere) {
  EXPECT_THAT(RunCoordinator::RunIdOf(*store_), IsOkAndHolds(""));
  const PlayedRun played{.run_id = "0123456789abcdef", .specification_hash = kSpec, .last_episode = 12,
                         .training_episodes = 7, .training_rows = 350};
  ASSERT_OK(RunCoordinator::WritePlayed(*store_, played));
  EXPECT_THAT(RunCoordinator::RunIdOf(*store_), IsOkAndHolds("0123456789abcdef"));
  EXPECT_THAT(RunCoordinator::WritePlayed(*store_, played), StatusIs(absl::StatusCode::kAborted));
  RunCoordinator c(store_.get(), Alternate(5, 20, 10), clock_);
  const int64_t generation = *c.AcquireLearner("one");
  EXPECT_EQ(generation, 1);
  EXPECT_EQ(c.Progress()->rows_appended, 350);
  EXPECT_EQ(c.Progress()->episodes_finished, 7);
  EXPECT_EQ(Begin(c), "-");
  EXPECT_EQ(Reserve(c, generation, 0, 1000), 40);
  EXPECT_EQ(Reserve(c, generation, 40, 0), 0);
  EXPECT_EQ(Begin(c), "T");
  EXPECT_EQ(last_.episode_id, 13);
  ASSERT_OK(store_->CompareAndSet("run", store_->Get("run")->version, "{}"));
  EXPECT_THAT(RunCoordinator::RunIdOf(*store_), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("value 'run'")));
}

TEST(ValidatePacing, RefusesWhatCouldNotMakeProgress) {
  EXPECT_OK(ValidatePacing(Alternate(5, 10, 10)));
  EXPECT_OK(ValidatePacing(Alternate(0, 0, 10)));
  EXPECT_THAT(ValidatePacing(Alternate(0, 10, 10)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("learning.initial_updates is 10, expected 0")));
  config::v1::Experiment e = Concurrent(1, 2, 50);  // a chunk of 50 rows is 100 updates
  EXPECT_OK(ValidatePacing(e));
  e.mutable_replay()->mutable_limiter()->set_tolerance(49);
  EXPECT_THAT(ValidatePacing(e), StatusIs(absl::StatusCode::kInvalidArgument,
                                          HasSubstr("replay.limiter.tolerance is 49, expected at least 50")));
  e.mutable_replay()->mutable_limiter()->set_tolerance(50);
  e.mutable_environment()->set_time_limit(1000);
  e.mutable_environment()->set_action_repeat(8);
  EXPECT_THAT(ValidatePacing(e), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("has 125 rows")));
  e.mutable_replay()->mutable_limiter()->set_tolerance(125);
  EXPECT_OK(ValidatePacing(e));
}

}  // namespace
}  // namespace orrery
