#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "absl/cleanup/cleanup.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/envs/environment.h"
#include "libs/envs/renderer.h"
#include "libs/envs/rewards.h"
#include "libs/envs/rollout.h"
#include "libs/envs/simulator.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;
using Quality = EnvironmentOptions::Quality;
using Rows = std::vector<std::vector<double>>;

// What dm_control saw; see testdata/make_golden.py.
struct Golden {
  Rows action, qpos, qvel, position, velocity;
  std::vector<double> reward;
  std::vector<size_t> frames;
  std::string pixels;  // 64x64 then 32x32

  explicit Golden(const std::string& task) {
    const std::string base = SourceFile("libs/envs/testdata/" + task);
    const auto json = nlohmann::json::parse(ReadFile(base + ".json").value());
    json.at("action").get_to(action);
    json.at("qpos").get_to(qpos);
    json.at("qvel").get_to(qvel);
    json.at("position").get_to(position);
    json.at("velocity").get_to(velocity);
    json.at("reward").get_to(reward);
    json.at("frames").get_to(frames);
    pixels = ReadFile(base + ".bin").value();
  }

  absl::string_view Picture(size_t index, int size) const {
    const size_t before = size == 64 ? 0 : frames.size() * 64 * 64 * 3;
    return absl::string_view(pixels).substr(before + index * size * size * 3, size * size * 3);
  }
};

double MeanDifference(absl::string_view a, absl::string_view b) {
  EXPECT_EQ(a.size(), b.size());
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::abs(static_cast<uint8_t>(a[i]) - static_cast<uint8_t>(b[i]));
  return sum / static_cast<double>(a.size());
}

Array Matrix(const Rows& rows) {
  std::vector<double> flat;
  for (const auto& row : rows) flat.insert(flat.end(), row.begin(), row.end());
  return Array::From<double>(flat, {static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows[0].size())});
}

Array Vector(const std::vector<double>& values) {
  return Array::From<double>(values, {static_cast<int64_t>(values.size())});
}

void ExpectNear(const Array& actual, const Array& expected, double tolerance, const std::string& what) {
  ASSERT_EQ(actual.dtype, DType::kFloat64) << what;
  ASSERT_EQ(actual.shape, expected.shape) << what;
  for (int64_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(actual.as<double>()[i], expected.as<double>()[i], tolerance) << what << " number " << i;
  }
}

std::unique_ptr<Environment> Make(const EnvironmentOptions& options) {
  auto environment = MakeEnvironment(options);
  EXPECT_OK(environment);
  return *std::move(environment);
}

// Rewards and pictures of an episode's first `steps` steps with actions that follow from `seed`.
struct Trace {
  std::vector<double> rewards;
  std::vector<Array> images;
  bool operator==(const Trace&) const = default;
};
Trace Play(Environment& environment, uint64_t seed, int steps) {
  Trace trace;
  trace.images.push_back(environment.Reset(seed).value().observation.at("image"));
  for (int t = 0; t < steps; ++t) {
    const std::vector<float> action(environment.spec().action.size, std::sin(0.7f * t + seed));
    TimeStep step = environment.Step(action).value();
    trace.rewards.push_back(step.reward);
    trace.images.push_back(step.observation.at("image"));
  }
  return trace;
}

class GoldenTest : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenTest, RolloutMatchesDmControl) {
  const Golden golden(GetParam());
  ASSERT_GE(golden.reward.size(), 50u);
  const RolloutInput input = {.action = Matrix(golden.action), .qpos = Vector(golden.qpos[0]), .qvel = Vector(golden.qvel[0])};
  ASSERT_OK_AND_ASSIGN(ArrayMap out, Rollout(GetParam(), input, Quality::kReference));
  ExpectNear(out.at("reward"), Vector(golden.reward), 1e-6, "reward");
  ExpectNear(out.at("qpos"), Matrix(golden.qpos), 1e-9, "qpos");
  ExpectNear(out.at("qvel"), Matrix(golden.qvel), 1e-9, "qvel");
  ExpectNear(out.at("position"), Matrix(golden.position), 1e-9, "position");
  ExpectNear(out.at("velocity"), Matrix(golden.velocity), 1e-9, "velocity");
  const Array& image = out.at("image");
  ASSERT_EQ(image.shape, (std::vector<int64_t>{static_cast<int64_t>(golden.qpos.size()), 64, 64, 3}));
  for (size_t i = 0; i < golden.frames.size(); ++i) {
    const size_t bytes = 64 * 64 * 3;
    EXPECT_LE(MeanDifference(absl::string_view(image.bytes).substr(golden.frames[i] * bytes, bytes), golden.Picture(i, 64)), 0.5)
        << "row " << golden.frames[i];
  }
}

TEST_P(GoldenTest, SmallPicturesMatchDmControl) {
  const Golden golden(GetParam());
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator(GetParam(), 32, Quality::kReference));
  for (size_t i = 0; i < golden.frames.size(); ++i) {
    ASSERT_OK(simulator->ResetTo(golden.qpos[golden.frames[i]], golden.qvel[golden.frames[i]]));
    ASSERT_OK_AND_ASSIGN(Array image, simulator->Image());
    ASSERT_EQ(image.shape, (std::vector<int64_t>{32, 32, 3}));
    EXPECT_LE(MeanDifference(image.bytes, golden.Picture(i, 32)), 0.5) << "row " << golden.frames[i];
  }
}

TEST_P(GoldenTest, FastPicturesShowTheSameScene) {
  const Golden golden(GetParam());
  for (int size : {32, 64}) {
    ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator(GetParam(), size, Quality::kFast));
    for (size_t i = 0; i < golden.frames.size(); ++i) {
      ASSERT_OK(simulator->ResetTo(golden.qpos[golden.frames[i]], golden.qvel[golden.frames[i]]));
      ASSERT_OK_AND_ASSIGN(Array image, simulator->Image());
      // Shadows and reflections are what may differ, so that no other picture of the episode is nearer.
      std::vector<double> differences;
      for (size_t j = 0; j < golden.frames.size(); ++j) {
        differences.push_back(MeanDifference(image.bytes, golden.Picture(j, size)));
      }
      EXPECT_LE(differences[i], 4) << size << " row " << golden.frames[i];
      EXPECT_EQ(differences[i], *std::min_element(differences.begin(), differences.end())) << size << " frame " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tasks, GoldenTest, ::testing::Values("cartpole_balance", "cartpole_swingup"),
                         [](const auto& parameter) { return std::string(parameter.param); });

// The pole is thinner than a pixel: without anti-aliasing it is lost where it falls between two pixels' centres.
TEST(RendererTest, FastSmallPictureShowsThePoleWhereverItIs) {
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("cartpole_balance", 32, Quality::kFast));
  for (int i = 0; i < 32; ++i) {
    ASSERT_OK(simulator->ResetTo(std::vector<double>{0.1 * i / 32, 0}, std::nullopt));
    ASSERT_OK_AND_ASSIGN(Array image, simulator->Image());
    const auto pixels = image.as<uint8_t>();
    for (int row = 8; row < 14; ++row) {  // between the pole's tip and the cart
      int orange = -255;                  // the background is bluish
      for (int column = 0; column < 32; ++column) {
        orange = std::max(orange, pixels[(row * 32 + column) * 3] - pixels[(row * 32 + column) * 3 + 2]);
      }
      EXPECT_GE(orange, 0) << "cart position " << i << "/320, row " << row;
    }
  }
}

TEST(MujocoSimulatorTest, StartsAreDrawnAsInDmControl) {
  for (const bool swing_up : {false, true}) {
    ASSERT_OK_AND_ASSIGN(auto simulator,
                         MakeSimulator(swing_up ? "cartpole_swingup" : "cartpole_balance", 32, Quality::kFast));
    std::vector<double> sum(4), square(4);
    constexpr int kStarts = 2000;
    for (int seed = 0; seed < kStarts; ++seed) {
      ASSERT_OK(simulator->Reset(seed));
      const ArrayMap state = simulator->State();
      const auto qpos = state.at("qpos").as<double>(), qvel = state.at("qvel").as<double>();
      if (!swing_up) {
        ASSERT_LE(std::abs(qpos[0]), 0.1);
        ASSERT_LE(std::abs(qpos[1]), 0.034);
      }
      const double numbers[] = {qpos[0], qpos[1] - (swing_up ? M_PI : 0), qvel[0], qvel[1]};
      for (int i = 0; i < 4; ++i) {
        sum[i] += numbers[i];
        square[i] += numbers[i] * numbers[i];
      }
    }
    const double expected[] = {swing_up ? 0.01 : 0.1 / std::sqrt(3), swing_up ? 0.01 : 0.034 / std::sqrt(3), 0.01, 0.01};
    for (int i = 0; i < 4; ++i) {
      EXPECT_NEAR(sum[i] / kStarts, 0, 4 * expected[i] / std::sqrt(kStarts)) << i;
      EXPECT_NEAR(std::sqrt(square[i] / kStarts), expected[i], 0.08 * expected[i]) << i;
    }
  }
}

TEST(MujocoSimulatorTest, ReportsAStateThatCannotBeSimulatedAndRecovers) {
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("cartpole_balance", 32, Quality::kFast));
  ASSERT_OK(simulator->ResetTo(std::vector<double>{0, 0}, std::vector<double>{1e9, 1e9}));
  absl::Status status;
  for (int i = 0; i < 100 && status.ok(); ++i) status = simulator->Step({0.0}).status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("cartpole_balance")));
  ASSERT_OK(simulator->Reset(1));
  EXPECT_OK(simulator->Step({0.0}));
}

TEST(RewardsTest, ToleranceIsDmControls) {
  EXPECT_EQ(Tolerance(0.5, 0, 1, 2), 1);
  EXPECT_NEAR(Tolerance(3, 0, 1, 2), 0.1, 1e-12);
  EXPECT_NEAR(Tolerance(-1, 0, 1, 2), std::exp(0.25 * std::log(0.1)), 1e-12);
  EXPECT_NEAR(Tolerance(0.6, 0, 0, 1, Sigmoid::kQuadratic, 0), 0.64, 1e-12);
  EXPECT_EQ(Tolerance(-1.5, 0, 0, 1, Sigmoid::kQuadratic, 0), 0);
}

class TaskTest : public ::testing::TestWithParam<std::string> {};

TEST_P(TaskTest, SameSeedSameEpisode) {
  for (int size : {32, 64}) {
    const EnvironmentOptions options = {.task = GetParam(), .action_repeat = 2, .image_size = size};
    auto first = Make(options), second = Make(options);
    ASSERT_EQ(first->spec().observations, (std::vector<TensorSpec>{{"image", DType::kUInt8, {size, size, 3}}}));
    EXPECT_FALSE(first->spec().action.discrete);
    const Trace trace = Play(*first, 5, 6);
    EXPECT_EQ(trace.images[0].shape, (std::vector<int64_t>{size, size, 3}));
    EXPECT_EQ(trace, Play(*second, 5, 6));
    EXPECT_EQ(trace, Play(*first, 5, 6)) << "after an episode";
    EXPECT_NE(trace.rewards, Play(*first, 6, 6).rewards);
  }
}

TEST_P(TaskTest, DrawsPicturesForPeople) {
  auto environment = Make({.task = GetParam(), .image_size = 32});
  ASSERT_OK_AND_ASSIGN(TimeStep start, environment->Reset(1));
  ASSERT_OK_AND_ASSIGN(Array picture, environment->Render(96, 128));
  ASSERT_OK(CheckArray(picture, "picture"));
  EXPECT_EQ(picture.shape, (std::vector<int64_t>{96, 128, 3}));
  EXPECT_GT(std::set<char>(picture.bytes.begin(), picture.bytes.end()).size(), 10u);
  EXPECT_THAT(environment->Render(0, 10), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0x10")));
  EXPECT_THAT(environment->Render(10, 100000), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("10x100000")));
}

TEST_P(TaskTest, RefusesBadActions) {
  auto environment = Make({.task = GetParam(), .image_size = 32});
  const int size = environment->spec().action.size;
  std::vector<float> good(size, 0.5f), bad = good, large = good, one = good;
  EXPECT_THAT(environment->Step(good), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("Reset")));
  ASSERT_OK(environment->Reset(1));
  EXPECT_THAT(environment->Step(std::vector<float>(size + 1)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("expected " + std::to_string(size))));
  EXPECT_THAT(environment->Step({}), StatusIs(absl::StatusCode::kInvalidArgument));
  for (float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    bad.back() = value;
    EXPECT_THAT(environment->Step(bad), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("finite")));
  }
  // The episode goes on, and a number outside [-1, 1] counts as the nearest inside.
  large.back() = 7;
  one.back() = 1;
  ASSERT_OK_AND_ASSIGN(TimeStep step, environment->Step(large));
  ASSERT_OK(environment->Reset(1));
  ASSERT_OK_AND_ASSIGN(TimeStep expected, environment->Step(one));
  EXPECT_EQ(step.reward, expected.reward);
  EXPECT_EQ(step.observation, expected.observation);
}

TEST_P(TaskTest, ThreadsDoNotDisturbEachOther) {
  const EnvironmentOptions options = {.task = GetParam(), .image_size = 32};
  const Trace expected[] = {Play(*Make(options), 0, 10), Play(*Make(options), 1, 10)};
  Trace actual[2];
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) threads.emplace_back([&, i] { actual[i] = Play(*Make(options), i, 10); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(actual[0], expected[0]);
  EXPECT_EQ(actual[1], expected[1]);
}

TEST_P(TaskTest, MovesBetweenThreads) {
  const EnvironmentOptions options = {.task = GetParam(), .image_size = 32};
  auto environment = Make(options);
  const Trace expected = Play(*environment, 3, 5);
  Trace actual;
  std::thread([&] { actual = Play(*environment, 3, 5); }).join();
  EXPECT_EQ(actual, expected);
  std::thread([&] { environment.reset(); }).join();
  EXPECT_EQ(Play(*Make(options), 3, 5), expected);
}

// Full force to one side, or anything.
std::vector<float> PushThenRandom(int action_size, bool push, std::mt19937_64& random) {
  std::vector<float> action(action_size, 1.0f);
  if (push) return action;
  for (float& number : action) number = static_cast<float>(random() % 2001) / 1000 - 1;
  return action;
}

TEST_P(TaskTest, LookingAheadGivesTheRewardsOfPlaying) {
  constexpr int kTimeLimit = 107, kPushed = 80;
  for (const int repeat : {1, 8}) {
    const EnvironmentOptions options = {
        .task = GetParam(), .action_repeat = repeat, .image_size = 32, .time_limit = kTimeLimit};
    auto environment = Make(options);
    const int decisions = (kTimeLimit + repeat - 1) / repeat;
    std::mt19937_64 random(repeat);
    std::vector<std::vector<float>> actions;
    for (int t = 0; t < decisions; ++t) {
      actions.push_back(PushThenRandom(environment->spec().action.size, t * repeat < kPushed, random));
    }
    ASSERT_OK_AND_ASSIGN(auto lookahead, environment->MakeLookahead());
    ASSERT_OK(environment->Reset(3));
    std::vector<std::vector<double>> predicted(decisions);
    std::vector<double> played;
    for (int t = 0; t < decisions; ++t) {
      // Another future first: nothing of it may stay.
      ASSERT_OK(lookahead->Restart());
      for (int i = 0; i < 3; ++i) ASSERT_OK(lookahead->Step(PushThenRandom(environment->spec().action.size, false, random)));
      ASSERT_OK(lookahead->Restart());
      for (int i = t; i < decisions; ++i) {
        ASSERT_OK_AND_ASSIGN(const double reward, lookahead->Step(actions[i]));
        predicted[t].push_back(reward);
      }
      ASSERT_OK_AND_ASSIGN(const double after_the_end, lookahead->Step(actions[0]));
      EXPECT_EQ(after_the_end, 0);
      ASSERT_OK_AND_ASSIGN(TimeStep step, environment->Step(actions[t]));
      EXPECT_EQ(step.is_last, t == decisions - 1);
      played.push_back(step.reward);
    }
    for (int t = 0; t < decisions; ++t) {
      EXPECT_EQ(predicted[t], std::vector<double>(played.begin() + t, played.end())) << "repeat " << repeat << " from " << t;
    }
  }
}

TEST_P(TaskTest, LookingAheadDoesNotDisturbTheEnvironment) {
  const EnvironmentOptions options = {.task = GetParam(), .action_repeat = 2, .image_size = 32};
  const Trace expected = Play(*Make(options), 4, 8);
  auto environment = Make(options);
  ASSERT_OK_AND_ASSIGN(auto lookahead, environment->MakeLookahead());
  std::mt19937_64 random(1);
  Trace actual;
  ASSERT_OK_AND_ASSIGN(TimeStep step, environment->Reset(4));
  actual.images.push_back(step.observation.at("image"));
  for (int t = 0; t < 8; ++t) {
    ASSERT_OK(lookahead->Restart());
    for (int i = 0; i < 20; ++i) ASSERT_OK(lookahead->Step(PushThenRandom(environment->spec().action.size, false, random)));
    const std::vector<float> action(environment->spec().action.size, std::sin(0.7f * t + 4));  // as Play
    ASSERT_OK_AND_ASSIGN(step, environment->Step(action));
    actual.rewards.push_back(step.reward);
    actual.images.push_back(step.observation.at("image"));
  }
  EXPECT_EQ(actual, expected);
}

TEST_P(TaskTest, LookingAheadNeedsARunningEpisodeAndGoodActions) {
  auto environment = Make({.task = GetParam(), .image_size = 32});
  ASSERT_OK_AND_ASSIGN(auto lookahead, environment->MakeLookahead());
  const int size = environment->spec().action.size;
  EXPECT_THAT(lookahead->Restart(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("Reset")));
  ASSERT_OK(environment->Reset(1));
  EXPECT_THAT(lookahead->Step(std::vector<float>(size)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("Restart")));
  ASSERT_OK(lookahead->Restart());
  EXPECT_THAT(lookahead->Step(std::vector<float>(size + 1)), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_OK(lookahead->Step(std::vector<float>(size)));
}

INSTANTIATE_TEST_SUITE_P(Tasks, TaskTest, ::testing::ValuesIn(KnownTasks()),
                         [](const auto& parameter) { return parameter.param; });

// The action in its own units is the reward; one pixel of the picture counts the steps.
class FakeSimulator : public Simulator {
 public:
  const std::vector<std::pair<double, double>>& action_range() const override { return range_; }
  int time_limit() const override { return 7; }
  absl::Status Reset(uint64_t) override {
    steps_ = 0;
    return absl::OkStatus();
  }
  absl::Status ResetTo(std::optional<absl::Span<const double>>, std::optional<absl::Span<const double>>) override {
    return Reset(0);
  }
  absl::StatusOr<double> Step(absl::Span<const double> action) override {
    if (action[0] == 0) return absl::OutOfRangeError("the simulation became invalid");
    ++steps_;
    return action[0];
  }
  ArrayMap State() const override { return {}; }
  absl::StatusOr<Array> Image() override { return Array::From<uint8_t>({static_cast<uint8_t>(steps_), 0, 0}, {1, 1, 3}); }
  absl::StatusOr<Array> Render(int, int) override { return Image(); }

 private:
  const std::vector<std::pair<double, double>> range_ = {{0, 10}};
  int steps_ = 0;
};

TEST(ActionRepeatTest, SumsRewardsAndStopsAtTheEnd) {
  auto environment = MakeSimulatorEnvironment(std::make_unique<FakeSimulator>(), 1, 3, 0);
  ASSERT_OK_AND_ASSIGN(TimeStep step, environment->Reset(1));
  EXPECT_EQ(step.reward, 0);
  std::vector<double> rewards, pictures;
  while (!step.is_last) {
    ASSERT_OK_AND_ASSIGN(step, environment->Step({0.2f}));  // 6 in its own units
    rewards.push_back(std::round(step.reward * 1e4) / 1e4);
    pictures.push_back(step.observation.at("image").as<uint8_t>()[0]);
    EXPECT_FALSE(step.is_terminal);
  }
  EXPECT_THAT(rewards, ElementsAre(18, 18, 6));
  EXPECT_THAT(pictures, ElementsAre(3, 6, 7));
  EXPECT_THAT(environment->Step({0.2f}), StatusIs(absl::StatusCode::kFailedPrecondition));
  ASSERT_OK(environment->Reset(1));
  EXPECT_OK(environment->Step({0.2f}));
}

TEST(ActionRepeatTest, AFailedStepEndsTheEpisode) {
  auto environment = MakeSimulatorEnvironment(std::make_unique<FakeSimulator>(), 1, 2, 0);
  ASSERT_OK(environment->Reset(1));
  EXPECT_THAT(environment->Step({-1.0f}), StatusIs(absl::StatusCode::kOutOfRange));
  EXPECT_THAT(environment->Step({0.5f}), StatusIs(absl::StatusCode::kFailedPrecondition));
  ASSERT_OK(environment->Reset(1));
  EXPECT_OK(environment->Step({0.5f}));
}

TEST(LookaheadTest, IsNotOfferedWithoutACopyOfTheSimulator) {
  auto environment = MakeSimulatorEnvironment(std::make_unique<FakeSimulator>(), 1, 2, 0);
  EXPECT_THAT(environment->MakeLookahead(), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("cannot be copied")));
}

TEST(ActionRepeatTest, MujocoRewardsAreThoseOfSingleSteps) {
  auto single = Make({.task = "cartpole_swingup", .action_repeat = 1, .image_size = 32});
  auto repeated = Make({.task = "cartpole_swingup", .action_repeat = 4, .image_size = 32});
  ASSERT_OK(single->Reset(2));
  ASSERT_OK(repeated->Reset(2));
  for (float action : {0.3f, -1.0f, 0.9f}) {
    ASSERT_OK_AND_ASSIGN(TimeStep whole, repeated->Step({action}));
    TimeStep part;
    double sum = 0;
    for (int i = 0; i < 4; ++i) {
      ASSERT_OK_AND_ASSIGN(part, single->Step({action}));
      sum += part.reward;
    }
    EXPECT_EQ(whole.reward, sum);
    EXPECT_EQ(whole.observation, part.observation);
  }
}

TEST(TimeLimitTest, EndsTheEpisode) {
  const struct {
    EnvironmentOptions options;
    int steps;
  } cases[] = {{{.task = "cartpole_balance", .action_repeat = 8, .image_size = 32}, 125},
               {{.task = "cartpole_balance", .action_repeat = 4, .image_size = 32, .time_limit = 10}, 3},
               {{.task = "point_pixels", .image_size = 32}, 50}};
  for (const auto& [options, steps] : cases) {
    auto environment = Make(options);
    ASSERT_OK_AND_ASSIGN(TimeStep step, environment->Reset(1));
    const std::vector<float> action(environment->spec().action.size, 0.1f);
    int played = 0;
    for (; !step.is_last && played < 1001; ++played) {
      ASSERT_OK_AND_ASSIGN(step, environment->Step(action));
      EXPECT_FALSE(step.is_terminal);
    }
    EXPECT_EQ(played, steps);
    EXPECT_THAT(environment->Step(action), StatusIs(absl::StatusCode::kFailedPrecondition));
  }
}

TEST(MakeEnvironmentTest, RefusesBadOptions) {
  EXPECT_THAT(KnownTasks(), UnorderedElementsAre("cartpole_balance", "cartpole_swingup", "point_pixels"));
  EXPECT_THAT(MakeEnvironment({.task = "cartpole"}),
              StatusIs(absl::StatusCode::kNotFound, AllOf(HasSubstr("\"cartpole\""), HasSubstr("cartpole_balance"),
                                                          HasSubstr("cartpole_swingup"), HasSubstr("point_pixels"))));
  for (const std::string& task : KnownTasks()) {
    EXPECT_THAT(MakeEnvironment({.task = task, .image_size = 48}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("image_size is 48")));
    EXPECT_THAT(MakeEnvironment({.task = task, .action_repeat = 0}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("action_repeat is 0")));
    EXPECT_THAT(MakeEnvironment({.task = task, .time_limit = -1}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("time_limit is -1")));
  }
}

TEST(MakeEnvironmentTest, NamesAMissingOrDamagedTaskFile) {
  const char* present = std::getenv("ORRERY_SUITE");
  const std::string before = present == nullptr ? "" : present;
  absl::Cleanup restore = [&] {
    if (present == nullptr) {
      unsetenv("ORRERY_SUITE");
    } else {
      setenv("ORRERY_SUITE", before.c_str(), 1);
    }
  };
  TempDir folder;
  setenv("ORRERY_SUITE", folder.path().c_str(), 1);
  const EnvironmentOptions options = {.task = "cartpole_balance"};
  const auto names_it = AllOf(HasSubstr(folder / "cartpole.xml"), HasSubstr("tools/setup.sh"));
  EXPECT_THAT(MakeEnvironment(options), StatusIs(absl::StatusCode::kNotFound, names_it));
  ASSERT_OK(WriteFileAtomically(folder / "cartpole.xml", "<mujoco><include file=\"./common/skybox.xml\"/></mujoco>"));
  EXPECT_THAT(MakeEnvironment(options),
              StatusIs(absl::StatusCode::kNotFound, AllOf(names_it, HasSubstr("common/skybox.xml"))));
  ASSERT_OK(WriteFileAtomically(folder / "cartpole.xml", "<mujoco><worldbody>"));
  EXPECT_THAT(MakeEnvironment(options), StatusIs(absl::StatusCode::kFailedPrecondition, names_it));
  EXPECT_OK(MakeEnvironment({.task = "point_pixels"}));
}

TEST(RolloutTest, RefusesArraysThatDoNotFit) {
  const RolloutInput good = {.action = Matrix({{0.1}, {0.2}})};
  const auto refused = [&](const std::string& words, auto change) {
    RolloutInput input = good;
    change(input);
    EXPECT_THAT(Rollout("cartpole_balance", input, Quality::kFast),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(words)));
  };
  ASSERT_OK(Rollout("cartpole_balance", good, Quality::kFast));
  refused("expected [T, 1]", [](RolloutInput& in) { in.action = Matrix({{0.1, 0.2}}); });
  refused("expected [T, 1]", [](RolloutInput& in) { in.action = Vector({0.1}); });
  refused("action[1] is nan", [](RolloutInput& in) { in.action = Matrix({{0}, {std::nan("")}}); });
  refused("action is uint8", [](RolloutInput& in) { in.action = Array::Zeros(DType::kUInt8, {2, 1}); });
  refused("action", [](RolloutInput& in) { in.action.bytes.pop_back(); });
  refused("qpos has 3 numbers, expected 2", [](RolloutInput& in) { in.qpos = Vector({0, 0, 0}); });
  refused("qvel[0] is inf", [](RolloutInput& in) { in.qvel = Vector({INFINITY, 0}); });
  EXPECT_THAT(Rollout("nothing", good, Quality::kFast), StatusIs(absl::StatusCode::kNotFound));
}

TEST(RolloutTest, StartsWhereItIsTold) {
  RolloutInput input = {.action = Array::Zeros(DType::kFloat32, {0, 1}), .seed = 4};
  ASSERT_OK_AND_ASSIGN(ArrayMap drawn, Rollout("cartpole_swingup", input, Quality::kFast));
  EXPECT_NEAR(drawn.at("qpos").as<double>()[1], M_PI, 0.1);
  EXPECT_EQ(drawn.at("reward").shape, (std::vector<int64_t>{0}));
  EXPECT_EQ(drawn.at("image").shape, (std::vector<int64_t>{1, 64, 64, 3}));
  input.qpos = Array::From<float>({0.5f, 0.25f}, {2});
  ASSERT_OK_AND_ASSIGN(ArrayMap given, Rollout("cartpole_swingup", input, Quality::kFast));
  EXPECT_THAT(given.at("qpos").as<double>(), ElementsAre(0.5, 0.25));
  EXPECT_THAT(given.at("qvel").as<double>(), ElementsAre(0, 0));
}

TEST(PointPixelsTest, RolloutFollowsThePoint) {
  const RolloutInput input = {.action = Matrix({{1, 0}, {-0.5, 1}}), .qpos = Vector({-0.2, 0})};
  ASSERT_OK_AND_ASSIGN(ArrayMap out, Rollout("point_pixels", input, Quality::kFast));
  ExpectNear(out.at("qpos"), Matrix({{-0.2, 0}, {0, 0}, {-0.1, 0.2}}), 1e-12, "qpos");
  ExpectNear(out.at("reward"), Vector({1, std::exp(-0.05 / 0.18)}), 1e-12, "reward");
  EXPECT_EQ(out.count("qvel"), 0u);
  // Up in the world is up in the picture.
  const auto pixel = [&](int frame, int row, int column) {
    return out.at("image").as<uint8_t>()[((frame * 64 + row) * 64 + column) * 3];
  };
  EXPECT_GT(pixel(1, 32, 32), 240);
  EXPECT_GT(pixel(2, 27, 29), 240);
  EXPECT_LT(pixel(2, 36, 32), 100);
}

TEST(PointPixelsTest, ThePictureTellsWhatToDoAndThatPaysFarMoreThanChance) {
  auto environment = Make({.task = "point_pixels", .image_size = 32});
  std::mt19937_64 engine(1);
  const auto mean_return = [&](bool look) {
    double sum = 0;
    for (int episode = 0; episode < 10; ++episode) {
      TimeStep step = environment->Reset(episode).value();
      while (!step.is_last) {
        float x = static_cast<float>(engine() % 2001) / 1000 - 1, y = static_cast<float>(engine() % 2001) / 1000 - 1;
        if (look) {  // Towards the centre from the mean place of the bright pixels.
          double sum_x = 0, sum_y = 0, count = 0;
          const auto pixels = step.observation.at("image").as<uint8_t>();
          for (int i = 0; i < 32 * 32; ++i) {
            if (pixels[i * 3] < 130) continue;
            sum_x += i % 32 - 15.5;
            sum_y += 15.5 - i / 32;
            ++count;
          }
          x = static_cast<float>(-0.3 * sum_x / count);
          y = static_cast<float>(-0.3 * sum_y / count);
        }
        step = environment->Step({x, y}).value();
        sum += step.reward;
      }
    }
    return sum / 10;
  };
  EXPECT_GT(mean_return(true), 40);
  EXPECT_LT(mean_return(false), 12);
}

TEST(HashTest, IsStableAndSeesEveryField) {
  const EnvironmentSpec spec = {{{"image", DType::kUInt8, {64, 64, 3}}, {"joints", DType::kFloat32, {26}}}, {6, false}};
  EXPECT_EQ(Hash(spec), 15719396237172630804u);
  std::set<uint64_t> hashes = {Hash(spec)};
  const auto changed = [&](auto change) {
    EnvironmentSpec other = spec;
    change(other);
    EXPECT_TRUE(hashes.insert(Hash(other)).second);
  };
  changed([](EnvironmentSpec& s) { s.action.size = 7; });
  changed([](EnvironmentSpec& s) { s.action.discrete = true; });
  changed([](EnvironmentSpec& s) { s.observations[0].name = "camera"; });
  changed([](EnvironmentSpec& s) { s.observations[0].dtype = DType::kInt32; });
  changed([](EnvironmentSpec& s) { s.observations[0].shape = {64, 3, 64}; });
  changed([](EnvironmentSpec& s) { s.observations[1].shape = {2, 6}; });
  changed([](EnvironmentSpec& s) { s.observations.pop_back(); });
}

}  // namespace
}  // namespace orrery
