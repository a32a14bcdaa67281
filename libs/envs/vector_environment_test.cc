#include "libs/envs/vector_environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "libs/base/status.h"
#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Says what the environments of a test do, and counts them. Thread-safe.
class Script {
 public:
  // Steps of episodes with this seed wait from now on.
  void Block(uint64_t seed) {
    absl::MutexLock lock(&mu_);
    blocked_ = seed;
  }
  void Unblock() {
    absl::MutexLock lock(&mu_);
    blocked_ = 0;
  }
  void Pass(uint64_t seed) {
    absl::MutexLock lock(&mu_);
    ++waiting_;
    auto free = [this, seed]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return blocked_ != seed || seed == 0; };
    mu_.Await(absl::Condition(&free));
    --waiting_;
  }
  void AwaitWaiting(int count) {
    absl::MutexLock lock(&mu_);
    auto there = [this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return waiting_ == count; };
    mu_.Await(absl::Condition(&there));
  }
  void Count(int change) {
    absl::MutexLock lock(&mu_);
    alive_ += change;
    made_ += change > 0;
  }
  void AwaitAlive(int count) {
    absl::MutexLock lock(&mu_);
    auto reached = [this, count]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return alive_ == count; };
    mu_.Await(absl::Condition(&reached));
  }
  int alive() {
    absl::MutexLock lock(&mu_);
    return alive_;
  }
  int made() {
    absl::MutexLock lock(&mu_);
    return made_;
  }

 private:
  absl::Mutex mu_;
  uint64_t blocked_ ABSL_GUARDED_BY(mu_) = 0;
  int waiting_ ABSL_GUARDED_BY(mu_) = 0;
  int alive_ ABSL_GUARDED_BY(mu_) = 0;
  int made_ ABSL_GUARDED_BY(mu_) = 0;
};

// "number" is the seed, then 31 times itself plus the action's first number. Actions from 100 on make it fail in several ways.
class FakeEnvironment : public Environment {
 public:
  static constexpr float kFail = 100, kThrow = 101, kThrowNumber = 102, kNan = 103, kShape = 104;

  FakeEnvironment(Script& script, int action_size) : script_(script) {
    spec_.observations = {{"number", DType::kFloat32, {1}}};
    spec_.action.size = action_size;
    script_.Count(1);
  }
  ~FakeEnvironment() override {
    EXPECT_TRUE(thread_ == std::thread::id() || thread_ == std::this_thread::get_id());
    script_.Count(-1);
  }
  const EnvironmentSpec& spec() const override { return spec_; }
  absl::StatusOr<TimeStep> Reset(uint64_t seed) override {
    thread_ = std::this_thread::get_id();
    seed_ = seed;
    number_ = static_cast<float>(seed);
    if (seed == 666) return absl::UnavailableError("no start");
    return Now();
  }
  absl::StatusOr<TimeStep> Step(absl::Span<const float> action) override {
    EXPECT_EQ(std::this_thread::get_id(), thread_);
    script_.Pass(seed_);
    if (action[0] == kFail) return absl::OutOfRangeError("it fell apart");
    if (action[0] == kThrow) throw std::runtime_error("thrown");
    if (action[0] == kThrowNumber) throw 7;
    number_ = std::fmod(31 * number_ + action[0], 1009.0f);
    TimeStep step = Now();
    if (action[0] == kNan) step.reward = std::nan("");
    if (action[0] == kShape) step.observation["number"].shape = {1, 1};
    return step;
  }
  absl::StatusOr<Array> Render(int height, int width) override {
    if (height < 1) return absl::InvalidArgumentError("a picture needs rows");
    return Array::Zeros(DType::kUInt8, {height, width, 3});
  }

 private:
  TimeStep Now() const {
    TimeStep step;
    step.observation["number"] = Array::From<float>({number_}, {1});
    step.reward = number_;
    return step;
  }

  Script& script_;
  EnvironmentSpec spec_;
  std::thread::id thread_;
  uint64_t seed_ = 0;
  float number_ = 0;
};

class VectorEnvironmentTest : public ::testing::Test {
 protected:
  VectorEnvironment::Options Options(int size) {
    VectorEnvironment::Options options;
    options.size = size;
    options.environment.task = "fake";
    options.clock = &clock_;
    options.make = [this](const EnvironmentOptions& task) -> absl::StatusOr<std::unique_ptr<Environment>> {
      if (task.task == "missing") return absl::NotFoundError("no such task");
      return std::make_unique<FakeEnvironment>(script_, task.task == "wide" ? 2 : 1);
    };
    return options;
  }
  std::unique_ptr<VectorEnvironment> Make(int size) {
    auto made = VectorEnvironment::Create(Options(size));
    EXPECT_OK(made);
    return *std::move(made);
  }
  // All environments have begun an episode with seed index + 1.
  std::unique_ptr<VectorEnvironment> MakeAndReset(int size) {
    auto made = Make(size);
    for (int i = 0; i < size; ++i) EXPECT_OK(made->Reset(i, i + 1));
    EXPECT_EQ(Indices(made->Take(absl::InfiniteDuration())).size(), static_cast<size_t>(size));
    return made;
  }
  static std::vector<int> Indices(const std::vector<VectorResult>& results) {
    std::vector<int> indices;
    for (const VectorResult& result : results) indices.push_back(result.index);
    return indices;
  }
  // The status of one step of environment 0.
  static absl::Status StepOnce(VectorEnvironment& all, float action) {
    RETURN_IF_ERROR(all.Step(0, {action}));
    std::vector<VectorResult> results = all.Take(absl::ZeroDuration());
    EXPECT_THAT(Indices(results), ElementsAre(0));
    return results.at(0).step.status();
  }

  Script script_;
  FakeClock clock_;
};

TEST_F(VectorEnvironmentTest, OneThatIsBlockedDoesNotHoldUpTheOthers) {
  auto all = MakeAndReset(3);
  script_.Block(1);
  for (int i = 0; i < 3; ++i) ASSERT_OK(all->Step(i, {1.0f}));
  int steps[3] = {};
  while (steps[1] < 20 || steps[2] < 20) {
    for (const VectorResult& result : all->Take(absl::ZeroDuration())) {
      ASSERT_OK(result.step);
      ASSERT_NE(result.index, 0);
      ++steps[result.index];
      ASSERT_OK(all->Step(result.index, {1.0f}));
    }
  }
  EXPECT_TRUE(all->busy(0));
  script_.Unblock();
  std::vector<int> late;
  while (all->busy() > 0) {
    for (const int index : Indices(all->Take(absl::InfiniteDuration()))) late.push_back(index);
  }
  EXPECT_THAT(late, ElementsAre(0, 1, 2));
}

TEST_F(VectorEnvironmentTest, WaitsForTheOthersAsLongAsItHasPatience) {
  auto all = MakeAndReset(2);
  script_.Block(1);
  for (int i = 0; i < 2; ++i) ASSERT_OK(all->Step(i, {1.0f}));
  std::vector<VectorResult> first;
  absl::Notification taken;
  std::thread taker([&] {
    first = all->Take(absl::Seconds(5));
    taken.Notify();
  });
  clock_.AwaitWaiters(1);
  clock_.Advance(absl::Seconds(4.9));
  clock_.AwaitWaiters(1);
  EXPECT_FALSE(taken.HasBeenNotified());
  clock_.Advance(absl::Seconds(0.1));
  taker.join();
  EXPECT_THAT(Indices(first), ElementsAre(1));
  // It has been waited for: the other's next step comes at once.
  ASSERT_OK(all->Step(1, {1.0f}));
  EXPECT_THAT(Indices(all->Take(absl::Seconds(5))), ElementsAre(1));
  script_.Unblock();
  EXPECT_THAT(Indices(all->Take(absl::Seconds(5))), ElementsAre(0));
  EXPECT_THAT(all->Take(absl::Seconds(5)), testing::IsEmpty()) << "nothing is busy";
}

TEST_F(VectorEnvironmentTest, ResultsDependOnSeedAndActionsAlone) {
  std::map<int, std::vector<float>> expected;  // by seed
  for (int seed = 1; seed <= 4; ++seed) {
    FakeEnvironment alone(script_, 1);
    ASSERT_OK_AND_ASSIGN(TimeStep step, alone.Reset(seed));
    for (int t = 0; t < 30; ++t) {
      expected[seed].push_back(step.observation.at("number").as<float>()[0]);
      ASSERT_OK_AND_ASSIGN(step, alone.Step({static_cast<float>(t)}));
    }
  }
  for (const int size : {1, 2, 4}) {
    for (const absl::Duration patience : {absl::ZeroDuration(), absl::InfiniteDuration()}) {
      auto all = Make(size);
      std::map<int, std::vector<float>> numbers;
      std::vector<int> seeds(size);
      int next_seed = 1;
      for (int i = 0; i < size; ++i) ASSERT_OK(all->Reset(i, seeds[i] = next_seed++));
      while (all->busy() > 0) {
        for (const VectorResult& result : all->Take(patience)) {
          std::vector<float>& episode = numbers[seeds[result.index]];
          ASSERT_OK(result.step);
          episode.push_back(result.step->observation.at("number").as<float>()[0]);
          if (episode.size() < 30) {
            ASSERT_OK(all->Step(result.index, {static_cast<float>(episode.size() - 1)}));
          } else if (next_seed <= 4) {
            ASSERT_OK(all->Reset(result.index, seeds[result.index] = next_seed++));
          }
        }
      }
      EXPECT_EQ(numbers, expected) << size;
    }
  }
}

TEST_F(VectorEnvironmentTest, FailuresAreReportedAndTheNextResetMakesAnew) {
  auto all = MakeAndReset(2);
  const std::pair<float, std::pair<absl::StatusCode, std::string>> failures[] = {
      {FakeEnvironment::kFail, {absl::StatusCode::kOutOfRange, "it fell apart"}},
      {FakeEnvironment::kThrow, {absl::StatusCode::kInternal, "thrown"}},
      {FakeEnvironment::kThrowNumber, {absl::StatusCode::kInternal, "no std::exception"}},
      {FakeEnvironment::kNan, {absl::StatusCode::kInternal, "the reward is nan"}},
      {FakeEnvironment::kShape, {absl::StatusCode::kInternal, "number is float32 [1, 1], expected float32 [1]"}}};
  int made = 2;
  for (const auto& [action, expected] : failures) {
    EXPECT_THAT(StepOnce(*all, action), StatusIs(expected.first, HasSubstr(expected.second)));
    EXPECT_EQ(script_.alive(), 1) << "it was destroyed";
    EXPECT_THAT(StepOnce(*all, 1), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("Reset")));
    EXPECT_THAT(all->Render(0, 2, 2), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("Reset")));
    ASSERT_OK(all->Reset(0, 1));
    EXPECT_OK(all->Take(absl::ZeroDuration()).at(0).step);
    EXPECT_EQ(script_.made(), ++made);
    EXPECT_OK(StepOnce(*all, 1));
  }
  ASSERT_OK(all->Reset(0, 666));
  EXPECT_THAT(all->Take(absl::ZeroDuration()).at(0).step, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("no start")));
  ASSERT_OK(all->Step(1, {1.0f}));
  EXPECT_OK(all->Take(absl::ZeroDuration()).at(0).step) << "the other one goes on";
}

TEST_F(VectorEnvironmentTest, OneThatHangsIsGivenUp) {
  auto all = MakeAndReset(2);
  script_.Block(1);
  ASSERT_OK(all->Step(0, {1.0f}));
  std::vector<VectorResult> results;
  std::thread taker([&] { results = all->Take(absl::ZeroDuration()); });
  script_.AwaitWaiting(1);
  clock_.AwaitWaiters(1);
  clock_.Advance(absl::Seconds(61));
  taker.join();
  ASSERT_THAT(Indices(results), ElementsAre(0));
  EXPECT_THAT(results[0].step, StatusIs(absl::StatusCode::kDeadlineExceeded,
                                        HasSubstr("environment 0 (task \"fake\") did not return within 1m")));
  // It goes on with a new environment and a new thread while the old one still hangs.
  ASSERT_OK(all->Reset(0, 2));
  EXPECT_OK(all->Take(absl::ZeroDuration()).at(0).step);
  EXPECT_OK(StepOnce(*all, 1));
  EXPECT_EQ(script_.made(), 3);
  EXPECT_EQ(script_.alive(), 3);
  script_.Unblock();
  script_.AwaitAlive(2);  // the thread that hung has destroyed its environment
  EXPECT_OK(StepOnce(*all, 1));
  all.reset();
  EXPECT_EQ(script_.alive(), 0);
}

TEST_F(VectorEnvironmentTest, TheDestructorLeavesAHangingOneAlone) {
  auto all = MakeAndReset(2);
  script_.Block(1);
  ASSERT_OK(all->Step(0, {1.0f}));
  script_.AwaitWaiting(1);
  std::thread destroyer([&] { all.reset(); });
  script_.AwaitAlive(1);  // the other one has ended
  clock_.AwaitWaiters(1);
  clock_.Advance(absl::Seconds(11));
  destroyer.join();
  EXPECT_EQ(script_.alive(), 1);
  script_.Unblock();
  script_.AwaitAlive(0);
}

TEST_F(VectorEnvironmentTest, TheDestructorWaitsForACallThatEnds) {
  auto all = MakeAndReset(2);
  script_.Block(1);
  ASSERT_OK(all->Step(0, {1.0f}));
  script_.AwaitWaiting(1);
  std::thread destroyer([&] { all.reset(); });
  clock_.AwaitWaiters(1);
  script_.Unblock();
  destroyer.join();
  EXPECT_EQ(script_.alive(), 0);
}

TEST_F(VectorEnvironmentTest, InterruptEndsTakeEarly) {
  auto all = MakeAndReset(2);
  script_.Block(1);
  ASSERT_OK(all->Step(0, {1.0f}));
  std::vector<VectorResult> results(3);
  std::thread taker([&] { results = all->Take(absl::InfiniteDuration()); });
  clock_.AwaitWaiters(1);
  all->Interrupt();
  taker.join();
  EXPECT_THAT(results, testing::IsEmpty());
  EXPECT_THAT(all->Take(absl::ZeroDuration(), 1, clock_.Now()), testing::IsEmpty()) << "the deadline has passed";
  EXPECT_THAT(all->Take(absl::ZeroDuration(), 0), testing::IsEmpty()) << "none is needed";
  all->Interrupt();
  EXPECT_THAT(all->Take(absl::InfiniteDuration()), testing::IsEmpty()) << "kept for the next one";
  script_.Unblock();
  EXPECT_THAT(Indices(all->Take(absl::InfiniteDuration())), ElementsAre(0));
}

TEST_F(VectorEnvironmentTest, PlaysSeveralTasks) {
  auto all = MakeAndReset(1);
  ASSERT_OK(all->Reset(0, {.task = "other"}, 1));
  EXPECT_OK(all->Take(absl::ZeroDuration()).at(0).step);
  ASSERT_OK(all->Reset(0, 1));
  EXPECT_OK(all->Take(absl::ZeroDuration()).at(0).step);
  EXPECT_EQ(script_.made(), 2) << "each once";
  ASSERT_OK(all->Reset(0, {.task = "wide"}, 1));
  EXPECT_THAT(all->Take(absl::ZeroDuration()).at(0).step,
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("\"wide\" has other observations or actions")));
  ASSERT_OK(all->Reset(0, {.task = "missing"}, 1));
  EXPECT_THAT(all->Take(absl::ZeroDuration()).at(0).step, StatusIs(absl::StatusCode::kNotFound));
  ASSERT_OK(all->Reset(0, 1));
  EXPECT_OK(all->Take(absl::ZeroDuration()).at(0).step);
}

TEST_F(VectorEnvironmentTest, RefusesWhatDoesNotFitWithoutChangingAnything) {
  auto all = MakeAndReset(2);
  EXPECT_THAT(all->Step(2, {1.0f}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("environment 2, expected 0 to 1")));
  EXPECT_THAT(all->Reset(-1, 1), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(all->Step(0, {1.0f, 2.0f}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("has 2 numbers, expected 1")));
  EXPECT_THAT(all->Step(0, {std::nanf("")}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("action[0] is nan")));
  EXPECT_EQ(all->busy(), 0);
  script_.Block(1);
  ASSERT_OK(all->Step(0, {1.0f}));
  EXPECT_THAT(all->Step(0, {1.0f}), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("environment 0 is busy")));
  EXPECT_THAT(all->Reset(0, 1), StatusIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(all->Render(0, 2, 2), StatusIs(absl::StatusCode::kFailedPrecondition));
  script_.Unblock();
  EXPECT_OK(all->Take(absl::ZeroDuration()).at(0).step);
}

TEST_F(VectorEnvironmentTest, DrawsPicturesForPeople) {
  auto all = MakeAndReset(2);
  script_.Block(1);
  ASSERT_OK(all->Step(0, {1.0f}));
  ASSERT_OK_AND_ASSIGN(const Array picture, all->Render(1, 4, 6));
  EXPECT_EQ(picture.shape, (std::vector<int64_t>{4, 6, 3}));
  EXPECT_THAT(all->Render(1, 0, 6), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("needs rows")));
  EXPECT_EQ(script_.alive(), 2) << "nothing of the environment's has failed";
  EXPECT_OK(all->Render(1, 4, 6));
  script_.Unblock();
  EXPECT_THAT(Indices(all->Take(absl::ZeroDuration())), ElementsAre(0)) << "pictures are no results of Take";
}

TEST_F(VectorEnvironmentTest, CreateRefusesWhatCannotBeMade) {
  VectorEnvironment::Options options = Options(0);
  EXPECT_THAT(VectorEnvironment::Create(options),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("size is 0, expected 1 to 1024")));
  options = Options(1025);
  EXPECT_THAT(VectorEnvironment::Create(options), StatusIs(absl::StatusCode::kInvalidArgument));
  options = Options(1);
  options.timeout = absl::ZeroDuration();
  EXPECT_THAT(VectorEnvironment::Create(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("timeout is 0")));
  options = Options(2);
  options.environment.task = "missing";
  EXPECT_THAT(VectorEnvironment::Create(options), StatusIs(absl::StatusCode::kNotFound, HasSubstr("no such task")));
  options = Options(2);
  std::atomic<int> made = 0;
  options.make = [&](const EnvironmentOptions&) { return std::make_unique<FakeEnvironment>(script_, ++made); };
  EXPECT_THAT(VectorEnvironment::Create(options), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("differ")));
  using Made = absl::StatusOr<std::unique_ptr<Environment>>;
  options.make = [&](const EnvironmentOptions&) -> Made { throw std::runtime_error("thrown"); };
  EXPECT_THAT(VectorEnvironment::Create(options), StatusIs(absl::StatusCode::kInternal, HasSubstr("thrown")));
  EXPECT_EQ(script_.alive(), 0);
}

// Real tasks, drawn on several threads at once.
TEST(VectorEnvironmentTasksTest, EpisodesAreThoseOfAnEnvironmentAlone) {
  const EnvironmentOptions task = {.task = "cartpole_swingup", .action_repeat = 4, .image_size = 32};
  constexpr int kSize = 3, kSteps = 5;
  std::vector<std::vector<TimeStep>> expected(kSize), actual(kSize);
  ASSERT_OK_AND_ASSIGN(auto alone, MakeEnvironment(task));
  for (int i = 0; i < kSize; ++i) {
    ASSERT_OK_AND_ASSIGN(TimeStep step, alone->Reset(i));
    for (int t = 0; t < kSteps; ++t) {
      expected[i].push_back(step);
      ASSERT_OK_AND_ASSIGN(step, alone->Step({std::sin(static_cast<float>(t + i))}));
    }
  }
  ASSERT_OK_AND_ASSIGN(auto all, VectorEnvironment::Create({.size = kSize, .environment = task}));
  EXPECT_EQ(all->spec(), alone->spec());
  for (int i = 0; i < kSize; ++i) ASSERT_OK(all->Reset(i, i));
  while (all->busy() > 0) {
    for (VectorResult& result : all->Take(absl::ZeroDuration())) {
      ASSERT_OK(result.step);
      const int t = static_cast<int>(actual[result.index].size());
      actual[result.index].push_back(*std::move(result.step));
      if (t + 1 == kSteps) continue;
      ASSERT_OK(all->Step(result.index, {std::sin(static_cast<float>(t + result.index))}));
    }
  }
  for (int i = 0; i < kSize; ++i) {
    ASSERT_EQ(actual[i].size(), expected[i].size());
    for (int t = 0; t < kSteps; ++t) {
      EXPECT_EQ(actual[i][t].observation, expected[i][t].observation) << i << " " << t;
      EXPECT_EQ(actual[i][t].reward, expected[i][t].reward) << i << " " << t;
    }
  }
}

}  // namespace
}  // namespace orrery
