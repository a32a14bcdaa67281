#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
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
  Rows action;
  std::vector<double> reward;
  std::vector<size_t> starts = {0};  // first step of each rollout
  std::map<std::string, Rows> rows;  // qpos, qvel, observations: in each rollout one row more than steps
  std::vector<size_t> frames;        // rows with a picture
  std::string pixels;                // 64x64 then 32x32

  explicit Golden(const std::string& task) {
    const std::string base = SourceFile("libs/envs/testdata/" + task);
    const auto json = nlohmann::json::parse(ReadFile(base + ".json").value());
    json.at("action").get_to(action);
    json.at("reward").get_to(reward);
    json.at("frames").get_to(frames);
    if (json.contains("starts")) json.at("starts").get_to(starts);
    for (const auto& [name, values] : json.items()) {
      if (name != "action" && name != "reward" && name != "frames" && name != "starts") values.get_to(rows[name]);
    }
    pixels = ReadFile(base + ".bin").value();
  }

  // Spans into this object.
  SimulatorStart StartAt(size_t row) const {
    SimulatorStart start = {.qpos = rows.at("qpos")[row], .qvel = rows.at("qvel")[row]};
    if (const auto target = rows.find("target"); target != rows.end()) start.target = target->second[row];
    return start;
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

// Of the bytes: 1 for the same picture, also with another brightness and contrast.
double Correlation(absl::string_view a, absl::string_view b) {
  EXPECT_EQ(a.size(), b.size());
  double sum_a = 0, sum_b = 0, aa = 0, bb = 0, ab = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<uint8_t>(a[i]), y = static_cast<uint8_t>(b[i]);
    sum_a += x;
    sum_b += y;
    aa += x * x;
    bb += y * y;
    ab += x * y;
  }
  const double n = static_cast<double>(a.size());
  return (ab - sum_a * sum_b / n) / std::sqrt((aa - sum_a * sum_a / n) * (bb - sum_b * sum_b / n));
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

template <typename T>
std::vector<T> Part(const std::vector<T>& all, size_t begin, size_t end) {
  return std::vector<T>(all.begin() + begin, all.begin() + end);
}

// Tasks that are played by a simulator: all but those that are made of another task.
std::vector<std::string> SimulatorTasks() {
  std::vector<std::string> tasks = KnownTasks();
  tasks.erase(std::find(tasks.begin(), tasks.end(), "point_pixels_discrete"));
  return tasks;
}

std::vector<std::string> MujocoTaskNames() {
  std::vector<std::string> tasks = SimulatorTasks();
  tasks.erase(std::find(tasks.begin(), tasks.end(), "point_pixels"));
  return tasks;
}

std::string TaskName(const ::testing::TestParamInfo<std::string>& parameter) { return parameter.param; }

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

class GoldenTest : public ::testing::TestWithParam<std::string> {};

// Compares the `index`-th rollout; the first one's pictures too.
void ExpectRolloutMatches(const std::string& task, const Golden& golden, size_t index) {
  const size_t begin = golden.starts[index];
  const size_t end = index + 1 < golden.starts.size() ? golden.starts[index + 1] : golden.reward.size();
  const size_t first_row = begin + index, end_row = end + index + 1;
  const auto first = [&](const char* name) { return Vector(golden.rows.at(name)[first_row]); };
  RolloutInput input = {.action = Matrix(Part(golden.action, begin, end)), .qpos = first("qpos"), .qvel = first("qvel")};
  if (golden.rows.count("target") > 0) input.target = first("target");
  ASSERT_OK_AND_ASSIGN(ArrayMap out, Rollout(task, input, index == 0 ? Quality::kReference : Quality::kFast));
  ExpectNear(out.at("reward"), Vector(Part(golden.reward, begin, end)), 1e-6, "reward");
  EXPECT_EQ(out.size(), golden.rows.size() + 2) << "reward, image and what dm_control gives";
  for (const auto& [name, rows] : golden.rows) {
    ASSERT_EQ(out.count(name), 1u) << name;
    ExpectNear(out.at(name), Matrix(Part(rows, first_row, end_row)), 1e-6, name);
  }
  const Array& image = out.at("image");
  ASSERT_EQ(image.shape, (std::vector<int64_t>{static_cast<int64_t>(end_row - first_row), 64, 64, 3}));
  if (index > 0) return;
  for (size_t i = 0; i < golden.frames.size() && golden.frames[i] < end_row; ++i) {
    const size_t row = golden.frames[i], bytes = 64 * 64 * 3;
    const auto picture = absl::string_view(image.bytes).substr(row * bytes, bytes);
    EXPECT_LE(MeanDifference(picture, golden.Picture(i, 64)), 0.5) << "row " << row;
  }
}

TEST_P(GoldenTest, RolloutMatchesDmControl) {
  const Golden golden(GetParam());
  ASSERT_GE(golden.reward.size(), 50u);
  for (size_t i = 0; i < golden.starts.size(); ++i) {
    SCOPED_TRACE("rollout " + std::to_string(i));
    ExpectRolloutMatches(GetParam(), golden, i);
  }
}

// Otherwise the other tests could pass with a reward that is always 0.
TEST_P(GoldenTest, RewardsVary) {
  const Golden golden(GetParam());
  const auto [least, most] = std::minmax_element(golden.reward.begin(), golden.reward.end());
  EXPECT_GT(*most, *least + 1e-3);
}

TEST_P(GoldenTest, PicturesMatchDmControl) {
  const Golden golden(GetParam());
  for (int size : {32, 64}) {
    ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator(GetParam(), size, Quality::kReference));
    for (size_t i = 0; i < golden.frames.size(); ++i) {
      ASSERT_OK(simulator->ResetTo(golden.StartAt(golden.frames[i])));
      ASSERT_OK_AND_ASSIGN(Array image, simulator->Image());
      ASSERT_EQ(image.shape, (std::vector<int64_t>{size, size, 3}));
      EXPECT_LE(MeanDifference(image.bytes, golden.Picture(i, size)), 0.5) << size << " row " << golden.frames[i];
    }
  }
}

TEST_P(GoldenTest, FastPicturesShowTheSameScene) {
  const Golden golden(GetParam());
  for (int size : {32, 64}) {
    ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator(GetParam(), size, Quality::kFast));
    for (size_t i = 0; i < golden.frames.size(); ++i) {
      ASSERT_OK(simulator->ResetTo(golden.StartAt(golden.frames[i])));
      ASSERT_OK_AND_ASSIGN(Array image, simulator->Image());
      // Shadows and reflections are what may differ: they make the ground brighter or darker, and no other picture is nearer.
      EXPECT_GE(Correlation(image.bytes, golden.Picture(i, size)), 0.85) << size << " row " << golden.frames[i];
      std::vector<double> differences;
      for (size_t j = 0; j < golden.frames.size(); ++j) {
        differences.push_back(MeanDifference(image.bytes, golden.Picture(j, size)));
      }
      EXPECT_EQ(differences[i], *std::min_element(differences.begin(), differences.end())) << size << " frame " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tasks, GoldenTest, ::testing::ValuesIn(MujocoTaskNames()), TaskName);

// The pole is thinner than a pixel: without anti-aliasing it is lost where it falls between two pixels' centres.
TEST(RendererTest, FastSmallPictureShowsThePoleWhereverItIs) {
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("cartpole_balance", 32, Quality::kFast));
  for (int i = 0; i < 32; ++i) {
    ASSERT_OK(simulator->ResetTo({.qpos = std::vector<double>{0.1 * i / 32, 0}}));
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

// The string is thinner still. It is grey; behind it everything is bluish.
TEST(RendererTest, FastSmallPictureShowsTheStringWhereverItIs) {
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("ball_in_cup_catch", 32, Quality::kFast));
  for (int i = 0; i < 32; ++i) {
    const double x = 0.1 * i / 32;
    ASSERT_OK(simulator->ResetTo({.qpos = std::vector<double>{x, 0, x + 0.02, 0}}));
    ASSERT_OK_AND_ASSIGN(Array image, simulator->Image());
    const auto pixels = image.as<uint8_t>();
    for (int row = 12; row < 16; ++row) {  // between cup and ball
      std::vector<int> grey;
      for (int column = 0; column < 32; ++column) {
        grey.push_back(pixels[(row * 32 + column) * 3] - pixels[(row * 32 + column) * 3 + 2]);
      }
      std::sort(grey.begin(), grey.end());
      int more = 0;  // than the background's, in the one or two pixels that the string crosses
      for (const int value : grey) more += std::max(0, value - grey[16]);
      EXPECT_GE(more, 5) << "cup position " << x << ", row " << row;
    }
  }
}

constexpr double kDegree = M_PI / 180;
using Ranges = std::vector<std::pair<double, double>>;

// Lowest and highest of each position over many starts; all must be at rest.
Ranges PositionsOfStarts(const std::string& task) {
  Ranges found;
  auto simulator = MakeSimulator(task, 32, Quality::kFast).value();
  for (int seed = 0; seed < 300; ++seed) {
    EXPECT_OK(simulator->Reset(seed));
    const ArrayMap state = simulator->State();
    for (const double velocity : state.at("qvel").as<double>()) EXPECT_EQ(velocity, 0) << task << " seed " << seed;
    const auto qpos = state.at("qpos").as<double>();
    found.resize(qpos.size(), {INFINITY, -INFINITY});
    for (size_t i = 0; i < qpos.size(); ++i) {
      found[i] = {std::min(found[i].first, qpos[i]), std::max(found[i].second, qpos[i])};
    }
  }
  return found;
}

TEST(MujocoSimulatorTest, JointsStartAnywhereInTheirRanges) {
  const std::pair<double, double> zero = {0, 0}, turn = {-M_PI, M_PI}, finger = {-110 * kDegree, 110 * kDegree},
                                  hip = {-20 * kDegree, 100 * kDegree}, knee = {-150 * kDegree, 0},
                                  ankle = {-45 * kDegree, 45 * kDegree};
  const std::pair<std::string, Ranges> cases[] = {
      {"ball_in_cup_catch", {zero, zero, {-0.2, 0.2}, {0.2, 0.5}}},
      {"finger_spin", {finger, finger, turn}},
      {"hopper_stand",
       {zero, zero, turn, {-30 * kDegree, 30 * kDegree}, {-170 * kDegree, 10 * kDegree}, {5 * kDegree, 150 * kDegree}, ankle}},
      {"pendulum_swingup", {turn}},
      {"reacher_easy", {turn, {-160 * kDegree, 160 * kDegree}}},
      {"walker_walk", {zero, zero, turn, hip, knee, ankle, hip, knee, ankle}}};
  for (const auto& [task, expected] : cases) {
    const Ranges found = PositionsOfStarts(task);
    ASSERT_EQ(found.size(), expected.size()) << task;
    for (size_t i = 0; i < found.size(); ++i) {
      const auto [low, high] = expected[i];
      const double tenth = (high - low) / 10;
      EXPECT_GE(found[i].first, low) << task << " " << i;
      EXPECT_LE(found[i].first, low + tenth) << task << " " << i;
      EXPECT_GE(found[i].second, high - tenth) << task << " " << i;
      EXPECT_LE(found[i].second, high) << task << " " << i;
    }
  }
}

TEST(MujocoSimulatorTest, TheReachersTargetIsDrawnFromARing) {
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("reacher_easy", 32, Quality::kFast));
  double nearest = INFINITY, farthest = 0;
  std::set<std::pair<bool, bool>> quadrants;
  for (int seed = 0; seed < 300; ++seed) {
    ASSERT_OK(simulator->Reset(seed));
    const ArrayMap state = simulator->State();
    const auto target = state.at("target").as<double>();
    const double radius = std::hypot(target[0], target[1]);
    nearest = std::min(nearest, radius);
    farthest = std::max(farthest, radius);
    quadrants.insert({target[0] > 0, target[1] > 0});
  }
  EXPECT_GE(nearest, 0.05);
  EXPECT_LE(nearest, 0.06);
  EXPECT_GE(farthest, 0.19);
  EXPECT_LE(farthest, 0.2);
  EXPECT_EQ(quadrants.size(), 4u);
}

double DistanceToSegment(double x, double z, double x0, double z0, double x1, double z1) {
  const double dx = x1 - x0, dz = z1 - z0;
  const double along = std::clamp(((x - x0) * dx + (z - z0) * dz) / (dx * dx + dz * dz), 0.0, 1.0);
  return std::hypot(x - x0 - along * dx, z - z0 - along * dz);
}

TEST(MujocoSimulatorTest, TheBallDoesNotStartInTheCupsWalls) {
  // The walls' middle lines; the cup's origin is 0.4 above the ball's.
  const double corners[][2] = {{-0.05, 0}, {-0.05, -0.075}, {-0.025, -0.1}, {0.025, -0.1}, {0.05, -0.075}, {0.05, 0}};
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("ball_in_cup_catch", 32, Quality::kFast));
  for (int seed = 0; seed < 300; ++seed) {
    ASSERT_OK(simulator->Reset(seed));
    const ArrayMap state = simulator->State();
    const auto qpos = state.at("qpos").as<double>();
    for (int i = 0; i < 5; ++i) {
      const double distance =
          DistanceToSegment(qpos[2], qpos[3] - 0.4, corners[i][0], corners[i][1], corners[i + 1][0], corners[i + 1][1]);
      EXPECT_GE(distance, 0.025 + 0.008) << "seed " << seed << " wall " << i;
    }
  }
}

// Nothing pulls at a finger at rest: what moves was pushed by a contact.
TEST(MujocoSimulatorTest, TheFingerDoesNotStartInTheSpinner) {
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("finger_spin", 32, Quality::kFast));
  for (int seed = 0; seed < 300; ++seed) {
    ASSERT_OK(simulator->Reset(seed));
    ASSERT_OK(simulator->Step({0.0, 0.0}));
    const ArrayMap state = simulator->State();
    for (const double velocity : state.at("qvel").as<double>()) EXPECT_NEAR(velocity, 0, 1e-9) << "seed " << seed;
    EXPECT_THAT(state.at("touch").as<double>(), ElementsAre(0, 0)) << "seed " << seed;
  }
}

// It was dropped and came to rest on the ground, in a posture of its own.
TEST(MujocoSimulatorTest, TheCheetahStartsSettled) {
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("cheetah_run", 32, Quality::kFast));
  std::set<double> heights;
  for (int seed = 0; seed < 20; ++seed) {
    ASSERT_OK(simulator->Reset(seed));
    const ArrayMap state = simulator->State();
    for (const double velocity : state.at("qvel").as<double>()) EXPECT_NEAR(velocity, 0, 0.5) << "seed " << seed;
    const double height = state.at("qpos").as<double>()[1];
    EXPECT_LT(height, -0.01) << "seed " << seed;
    EXPECT_GT(height, -0.6) << "seed " << seed;
    heights.insert(height);
  }
  EXPECT_EQ(heights.size(), 20u);
}

class MujocoTaskTest : public ::testing::TestWithParam<std::string> {};

TEST_P(MujocoTaskTest, HasTheSizesOfDmControl) {
  struct Sizes {
    size_t actions, qpos, qvel;
  };
  const std::map<std::string, Sizes> domains = {{"ball_in_cup", {2, 4, 4}}, {"cartpole", {1, 2, 2}}, {"cheetah", {6, 9, 9}},
                                                {"finger", {2, 3, 3}},      {"hopper", {4, 7, 7}},   {"pendulum", {1, 1, 1}},
                                                {"reacher", {2, 2, 2}},     {"walker", {6, 9, 9}}};
  const Sizes expected = domains.at(GetParam().substr(0, GetParam().rfind('_')));
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator(GetParam(), 32, Quality::kFast));
  EXPECT_EQ(simulator->action_range(), Ranges(expected.actions, {-1, 1}));
  EXPECT_EQ(simulator->time_limit(), 1000);
  ASSERT_OK(simulator->Reset(1));
  const ArrayMap state = simulator->State();
  EXPECT_EQ(state.at("qpos").as<double>().size(), expected.qpos);
  EXPECT_EQ(state.at("qvel").as<double>().size(), expected.qvel);
}

TEST_P(MujocoTaskTest, EpisodesEndByTimeAlone) {
  constexpr int kRepeat = 40;
  auto environment = Make({.task = GetParam(), .action_repeat = kRepeat, .image_size = 32});
  ASSERT_OK_AND_ASSIGN(TimeStep step, environment->Reset(2));
  std::mt19937_64 random(2);
  std::vector<float> action(environment->spec().action.size);
  for (int decision = 1; decision <= 1000 / kRepeat; ++decision) {
    for (float& number : action) number = static_cast<float>(random() % 2001) / 1000 - 1;
    ASSERT_OK_AND_ASSIGN(step, environment->Step(action));
    EXPECT_FALSE(step.is_terminal);
    EXPECT_EQ(step.is_last, decision == 1000 / kRepeat);
    EXPECT_GE(step.reward, 0);
    EXPECT_LE(step.reward, kRepeat);
  }
}

INSTANTIATE_TEST_SUITE_P(Tasks, MujocoTaskTest, ::testing::ValuesIn(MujocoTaskNames()), TaskName);

TEST(MujocoSimulatorTest, ReportsAStateThatCannotBeSimulatedAndRecovers) {
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("cartpole_balance", 32, Quality::kFast));
  ASSERT_OK(simulator->ResetTo({.qpos = std::vector<double>{0, 0}, .qvel = std::vector<double>{1e9, 1e9}}));
  absl::Status status;
  for (int i = 0; i < 100 && status.ok(); ++i) status = simulator->Step({0.0}).status();
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("cartpole_balance")));
  ASSERT_OK(simulator->Reset(1));
  EXPECT_OK(simulator->Step({0.0}));
}

TEST(RewardsTest, WithoutAMarginOnlyTheBoundsCount) {
  for (const double inside : {0.5, 0.75, 1.0}) EXPECT_EQ(Tolerance(inside, 0.5, 1, 0), 1) << inside;
  for (const double outside : {-1.0, 0.4999, 1.0001, 7.0}) EXPECT_EQ(Tolerance(outside, 0.5, 1, 0), 0) << outside;
}

TEST(RewardsTest, GaussianFallsWithTheSquareInTheExponent) {
  EXPECT_EQ(Tolerance(0.5, 0, 1, 2), 1);
  EXPECT_NEAR(Tolerance(3, 0, 1, 2), 0.1, 1e-12);
  EXPECT_NEAR(Tolerance(-1, 0, 1, 2), 0.5623413251903491, 1e-12);                           // 0.1^(1/4)
  EXPECT_NEAR(Tolerance(2.5, 0, 1, 3, Sigmoid::kGaussian, 0.5), 0.8408964152537145, 1e-12);  // 0.5^(1/4)
  EXPECT_NEAR(Tolerance(-6, 0, 1, 3, Sigmoid::kGaussian, 0.5), 0.0625, 1e-12);               // 0.5^4
}

TEST(RewardsTest, LinearFallsToZero) {
  EXPECT_EQ(Tolerance(12, 10, INFINITY, 10, Sigmoid::kLinear, 0), 1);
  EXPECT_NEAR(Tolerance(2.5, 10, INFINITY, 10, Sigmoid::kLinear, 0), 0.25, 1e-12);
  EXPECT_EQ(Tolerance(0, 10, INFINITY, 10, Sigmoid::kLinear, 0), 0);
  EXPECT_EQ(Tolerance(-5, 10, INFINITY, 10, Sigmoid::kLinear, 0), 0);
  EXPECT_NEAR(Tolerance(0.75, 1, INFINITY, 0.5, Sigmoid::kLinear, 0.5), 0.75, 1e-12);
  EXPECT_NEAR(Tolerance(0.5, 1, INFINITY, 0.5, Sigmoid::kLinear, 0.5), 0.5, 1e-12);
  EXPECT_NEAR(Tolerance(0.05, 1, INFINITY, 0.5, Sigmoid::kLinear, 0.5), 0.05, 1e-12);
  EXPECT_EQ(Tolerance(-0.25, 1, INFINITY, 0.5, Sigmoid::kLinear, 0.5), 0);
}

TEST(RewardsTest, QuadraticFallsToZero) {
  EXPECT_NEAR(Tolerance(0.6, 0, 0, 1, Sigmoid::kQuadratic, 0), 0.64, 1e-12);
  EXPECT_EQ(Tolerance(-1.5, 0, 0, 1, Sigmoid::kQuadratic, 0), 0);
  EXPECT_NEAR(Tolerance(2, 0, 1, 1, Sigmoid::kQuadratic, 0.5), 0.5, 1e-12);
  EXPECT_NEAR(Tolerance(-0.5, 0, 1, 1, Sigmoid::kQuadratic, 0.5), 0.875, 1e-12);
  EXPECT_EQ(Tolerance(2.5, 0, 1, 1, Sigmoid::kQuadratic, 0.5), 0);
}

class TaskTest : public ::testing::TestWithParam<std::string> {};

TEST_P(TaskTest, SameSeedSameEpisode) {
  const EnvironmentOptions options = {.task = GetParam(), .action_repeat = 2, .image_size = 32};
  auto first = Make(options), second = Make(options);
  ASSERT_EQ(first->spec().observations, (std::vector<TensorSpec>{{"image", DType::kUInt8, {32, 32, 3}}}));
  EXPECT_FALSE(first->spec().action.discrete);
  const Trace trace = Play(*first, 5, 6);
  EXPECT_EQ(trace, Play(*second, 5, 6));
  EXPECT_EQ(trace, Play(*first, 5, 6)) << "after an episode";
  EXPECT_NE(trace, Play(*first, 6, 6));
}

TEST_P(TaskTest, DrawsPicturesOfManySizes) {
  for (const int size : {33, 64, 84, 128}) {
    auto environment = Make({.task = GetParam(), .image_size = size});
    EXPECT_EQ(environment->spec().observations[0].shape, (std::vector<int64_t>{size, size, 3}));
    ASSERT_OK_AND_ASSIGN(TimeStep start, environment->Reset(1));
    const Array& image = start.observation.at("image");
    ASSERT_OK(CheckArray(image, "image"));
    EXPECT_EQ(image.shape, environment->spec().observations[0].shape);
    EXPECT_GT(std::set<char>(image.bytes.begin(), image.bytes.end()).size(), 10u) << size;
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
    const int every = repeat == 1 ? 9 : 1;  // decisions between two looks
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
      if (t % every == 0) {
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
      }
      ASSERT_OK_AND_ASSIGN(TimeStep step, environment->Step(actions[t]));
      EXPECT_EQ(step.is_last, t == decisions - 1);
      played.push_back(step.reward);
    }
    for (int t = 0; t < decisions; t += every) {
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

INSTANTIATE_TEST_SUITE_P(Tasks, TaskTest, ::testing::ValuesIn(SimulatorTasks()), TaskName);

// The action in its own units is the reward; one pixel of the picture counts the steps.
class FakeSimulator : public Simulator {
 public:
  const std::vector<std::pair<double, double>>& action_range() const override { return range_; }
  int time_limit() const override { return 7; }
  absl::Status Reset(uint64_t) override {
    steps_ = 0;
    return absl::OkStatus();
  }
  absl::Status ResetTo(const SimulatorStart&) override { return Reset(0); }
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

TEST(ActionSizeTest, FurtherNumbersAreIgnored) {
  auto own = Make({.task = "reacher_easy", .image_size = 32});
  auto padded = Make({.task = "reacher_easy", .image_size = 32, .action_size = 4});
  EXPECT_EQ(own->spec().action, (ActionSpec{2, false}));
  EXPECT_EQ(padded->spec().action, (ActionSpec{4, false}));
  ASSERT_OK(own->Reset(3));
  ASSERT_OK(padded->Reset(3));
  ASSERT_OK_AND_ASSIGN(auto lookahead, padded->MakeLookahead());
  ASSERT_OK(lookahead->Restart());
  for (const float x : {0.5f, -1.0f, 0.25f}) {
    ASSERT_OK_AND_ASSIGN(const TimeStep expected, own->Step({x, -x}));
    ASSERT_OK_AND_ASSIGN(const TimeStep step, padded->Step({x, -x, 1.0f, -0.5f}));
    EXPECT_EQ(step.observation, expected.observation);
    EXPECT_EQ(step.reward, expected.reward);
    EXPECT_THAT(lookahead->Step({x, -x, 0.1f, 7.0f}), IsOkAndHolds(expected.reward));
  }
  EXPECT_THAT(padded->Step({0.0f, 0.0f}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("expected 4")));
  EXPECT_THAT(padded->Step({0.0f, 0.0f, 0.0f, NAN}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("action[3] is nan")));
  EXPECT_THAT(lookahead->Step({0.0f, 0.0f}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("expected 4")));
}

TEST(ActionSizeTest, TheTasksOwnNumbersAreNeeded) {
  EXPECT_THAT(MakeEnvironment({.task = "walker_walk", .action_size = 5}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("action_size is 5, expected 0 or at least 6")));
  EXPECT_THAT(MakeEnvironment({.task = "point_pixels", .action_size = -1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("action_size is -1, expected 0 or at least 2")));
  EXPECT_EQ(Make({.task = "walker_walk", .action_size = 6})->spec().action.size, 6);
  EXPECT_EQ(Make({.task = "point_pixels_discrete", .action_size = 6})->spec().action, (ActionSpec{5, true}));
}

TEST(MakeEnvironmentTest, RefusesBadOptions) {
  EXPECT_THAT(KnownTasks(),
              UnorderedElementsAre("ball_in_cup_catch", "cartpole_balance", "cartpole_swingup", "cheetah_run", "finger_spin",
                                   "hopper_hop", "hopper_stand", "pendulum_swingup", "reacher_easy", "walker_run",
                                   "walker_stand", "walker_walk", "point_pixels", "point_pixels_discrete"));
  EXPECT_THAT(MakeEnvironment({.task = "cartpole"}),
              StatusIs(absl::StatusCode::kNotFound, AllOf(HasSubstr("\"cartpole\""), HasSubstr("cartpole_balance"),
                                                          HasSubstr("cartpole_swingup"), HasSubstr("point_pixels"))));
  for (const std::string& task : KnownTasks()) {
    EXPECT_THAT(MakeEnvironment({.task = task, .image_size = 31}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("image_size is 31, expected 32 to 128")));
    EXPECT_THAT(MakeEnvironment({.task = task, .image_size = 129}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("image_size is 129, expected 32 to 128")));
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
  // Another task's file, or one of another version.
  const std::pair<std::string, std::string> lacking[] = {
      {"hopper", "hop"}, {"reacher", "easy"}, {"finger", "spin"}, {"cartpole", "swingup"}};
  for (const auto& [domain, task] : lacking) {
    ASSERT_OK(WriteFileAtomically(folder / (domain + ".xml"), "<mujoco/>"));
    EXPECT_THAT(MakeEnvironment({.task = domain + "_" + task}),
                StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr(domain + ".xml"), HasSubstr("has no"))));
  }
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
  refused("target is given, but cartpole_balance has none", [](RolloutInput& in) { in.target = Vector({0, 0}); });
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

TEST(RolloutTest, PlacesTheTarget) {
  // The stretched arm reaches (0.24, 0); finger and target touch up to a distance of 0.01 + 0.05.
  const auto reward = [](const std::vector<double>& target) {
    const RolloutInput input = {.action = Matrix({{0, 0}}), .qpos = Vector({0, 0}), .target = Vector(target)};
    const ArrayMap out = Rollout("reacher_easy", input, Quality::kFast).value();
    EXPECT_THAT(out.at("target").as<double>(), ElementsAre(target[0], target[1], target[0], target[1]));
    EXPECT_NEAR(out.at("to_target").as<double>()[0], target[0] - 0.24, 1e-12);
    EXPECT_NEAR(out.at("to_target").as<double>()[1], target[1], 1e-12);
    return out.at("reward").as<double>()[0];
  };
  EXPECT_EQ(reward({0.24, 0.059}), 1);
  EXPECT_EQ(reward({0.24, 0.061}), 0);
  EXPECT_EQ(reward({0.181, 0}), 1);
  EXPECT_EQ(reward({0.179, 0}), 0);
  EXPECT_THAT(Rollout("reacher_easy", {.action = Matrix({{0, 0}}), .target = Vector({0, 0, 0})}, Quality::kFast),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("target has 3 numbers, expected 2")));
}

TEST(RolloutTest, ADrawnStartCanBeGiven) {
  RolloutInput input = {.action = Matrix({{1, -1}, {0.5, 0.25}, {-1, 0}}), .seed = 7};
  ASSERT_OK_AND_ASSIGN(const ArrayMap drawn, Rollout("reacher_easy", input, Quality::kFast));
  const auto first = [&](const char* name) {
    const auto numbers = drawn.at(name).as<double>();
    return Vector({numbers[0], numbers[1]});
  };
  input.qpos = first("qpos");
  input.qvel = first("qvel");
  input.target = first("target");
  input.seed = 8;
  ASSERT_OK_AND_ASSIGN(const ArrayMap given, Rollout("reacher_easy", input, Quality::kFast));
  EXPECT_EQ(given, drawn);
  // Without its place the target is where the file has it, not where an earlier episode left it.
  ASSERT_OK_AND_ASSIGN(auto simulator, MakeSimulator("reacher_easy", 32, Quality::kFast));
  ASSERT_OK(simulator->Reset(7));
  EXPECT_NE(simulator->State().at("target").as<double>()[0], 0);
  ASSERT_OK(simulator->ResetTo({.qpos = std::vector<double>{0, 0}}));
  EXPECT_THAT(simulator->State().at("target").as<double>(), ElementsAre(0, 0));
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
