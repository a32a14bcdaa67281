#include "libs/envs/tasks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "libs/base/status_matchers.h"
#include "libs/config/config.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

config::v1::Environment Parse(const std::string& text) {
  return ParseExperiment("environment { " + text + " }").value().environment();
}

// Only what a specification says.
class Described : public Environment {
 public:
  explicit Described(EnvironmentSpec spec) : spec_(std::move(spec)) {}
  const EnvironmentSpec& spec() const override { return spec_; }
  absl::StatusOr<TimeStep> Reset(uint64_t) override { return absl::UnimplementedError(""); }
  absl::StatusOr<TimeStep> Step(absl::Span<const float>) override { return absl::UnimplementedError(""); }
  absl::StatusOr<Array> Render(int, int) override { return absl::UnimplementedError(""); }

 private:
  const EnvironmentSpec spec_;
};

// "c3 image" has three continuous actions, "d3 image" three choices; the rest is the observation's name.
absl::StatusOr<std::unique_ptr<Environment>> MakeDescribed(const EnvironmentOptions& options) {
  if (options.task == "missing") return absl::NotFoundError("no such task");
  EnvironmentSpec spec;
  spec.action = {options.task[1] - '0', options.task[0] == 'd'};
  spec.observations = {{options.task.substr(3), DType::kUInt8, {options.image_size, options.image_size, 3}}};
  return std::make_unique<Described>(spec);
}

absl::StatusOr<std::vector<EnvironmentOptions>> Options(const std::string& text) {
  return TaskOptions(Parse(text), MakeDescribed);
}

TEST(TaskOptions, PadsActionsToTheLargest) {
  ASSERT_OK_AND_ASSIGN(const auto tasks, Options("action_repeat: 2 image_size: 32 tasks { name: 'c1 image' action_repeat: 8 } "
                                                 "tasks { name: 'c6 image' } tasks { name: 'c2 image' time_limit: 7 }"));
  ASSERT_EQ(tasks.size(), 3);
  for (const EnvironmentOptions& task : tasks) EXPECT_EQ(task.action_size, 6) << task.task;
  EXPECT_EQ(tasks[0].action_repeat, 8);
  EXPECT_EQ(tasks[1].action_repeat, 2);
  EXPECT_EQ(tasks[2].time_limit, 7);
  EXPECT_EQ(tasks[2].image_size, 32);
}

TEST(TaskOptions, OneTaskIsLeftAlone) {
  ASSERT_OK_AND_ASSIGN(const auto tasks, Options("task: 'missing'"));  // not even made
  ASSERT_EQ(tasks.size(), 1);
  EXPECT_EQ(tasks[0].action_size, 0);
}

TEST(TaskOptions, NamesTheTaskThatDoesNotFit) {
  const auto refuses = [](const std::string& a, const std::string& b, const std::string& what) {
    EXPECT_THAT(Options("tasks { name: '" + a + "' } tasks { name: '" + b + "' }"),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(a), HasSubstr(b), HasSubstr(what))));
  };
  refuses("c1 image", "c1 depth", "observations");
  refuses("c1 image", "d1 image", "kinds of actions");
  refuses("d3 image", "d4 image", "numbers of choices");
  EXPECT_OK(Options("tasks { name: 'd3 image' } tasks { name: 'd3 image' }"));
  EXPECT_THAT(Options("tasks { name: 'c1 image' } tasks { name: 'missing' }"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("missing: no such task")));
}

TEST(TaskOptions, TasksOfDifferentSizesCanBePlayedByOneAgent) {
  ASSERT_OK_AND_ASSIGN(const auto tasks, TaskOptions(Parse("image_size: 32 tasks { name: 'point_pixels' } "
                                                           "tasks { name: 'cartpole_swingup' }")));
  std::vector<EnvironmentSpec> specs;
  for (const EnvironmentOptions& options : tasks) {
    ASSERT_OK_AND_ASSIGN(const auto environment, MakeEnvironment(options));
    specs.push_back(environment->spec());
    ASSERT_OK(environment->Reset(1));
    EXPECT_OK(environment->Step(std::vector<float>{0.5f, -0.5f}));
    EXPECT_THAT(environment->Step(std::vector<float>{0.5f}), StatusIs(absl::StatusCode::kInvalidArgument));
  }
  EXPECT_EQ(specs[0], specs[1]);
  EXPECT_EQ(specs[0].action.size, 2);
}

// A padded task plays as if the further numbers were not there.
TEST(TaskOptions, FurtherNumbersAreIgnored) {
  EnvironmentOptions options{.task = "cartpole_swingup", .image_size = 32};
  ASSERT_OK_AND_ASSIGN(const auto alone, MakeEnvironment(options));
  options.action_size = 3;
  ASSERT_OK_AND_ASSIGN(const auto padded, MakeEnvironment(options));
  ASSERT_OK(alone->Reset(3));
  ASSERT_OK(padded->Reset(3));
  for (int i = 0; i < 5; ++i) {
    const float x = 0.3f * static_cast<float>(i) - 0.5f;
    ASSERT_OK_AND_ASSIGN(const TimeStep a, alone->Step(std::vector<float>{x}));
    ASSERT_OK_AND_ASSIGN(const TimeStep p, padded->Step(std::vector<float>{x, 0.9f, -x}));
    EXPECT_EQ(a.reward, p.reward);
    EXPECT_EQ(a.observation.at("image").bytes, p.observation.at("image").bytes);
  }
}

TEST(DiscreteActions, AChoicePlaysItsAction) {
  ASSERT_OK_AND_ASSIGN(const auto discrete, MakeEnvironment({.task = "point_pixels_discrete", .image_size = 32}));
  ASSERT_OK_AND_ASSIGN(const auto continuous, MakeEnvironment({.task = "point_pixels", .image_size = 32}));
  ASSERT_TRUE(discrete->spec().action.discrete);
  ASSERT_EQ(discrete->spec().action.size, 5);
  const std::vector<std::vector<float>> actions = {{0, 0}, {-1, 0}, {1, 0}, {0, -1}, {0, 1}};
  ASSERT_OK(discrete->Reset(5));
  ASSERT_OK(continuous->Reset(5));
  ASSERT_OK_AND_ASSIGN(const auto lookahead, discrete->MakeLookahead());
  for (int i = 0; i < 10; ++i) {
    std::vector<float> one_hot(5, 0.0f);
    one_hot[i % 5] = 1;
    ASSERT_OK(lookahead->Restart());
    ASSERT_OK_AND_ASSIGN(const double expected, lookahead->Step(one_hot));
    ASSERT_OK_AND_ASSIGN(const TimeStep d, discrete->Step(one_hot));
    ASSERT_OK_AND_ASSIGN(const TimeStep c, continuous->Step(actions[i % 5]));
    EXPECT_EQ(d.reward, c.reward);
    EXPECT_EQ(d.reward, expected);
    EXPECT_EQ(d.observation.at("image").bytes, c.observation.at("image").bytes);
  }
}

TEST(DiscreteActions, OnlyOneHotIsAChoice) {
  ASSERT_OK_AND_ASSIGN(const auto discrete, MakeEnvironment({.task = "point_pixels_discrete", .image_size = 32}));
  ASSERT_OK(discrete->Reset(5));
  for (const std::vector<float>& action : std::vector<std::vector<float>>{
           {}, {1, 0}, {0, 0, 0, 0, 0}, {1, 1, 0, 0, 0}, {0.5f, 0.5f, 0, 0, 0}, {1, 0, 0, 0, 0, 0}}) {
    EXPECT_THAT(discrete->Step(action), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("among 5 numbers")));
  }
  EXPECT_OK(discrete->Step(std::vector<float>{0, 0, 0, 0, 1}));
}

TEST(RegisterEnvironment, MakesATaskKnown) {
  ASSERT_OK(RegisterEnvironment("d4 of a program", MakeDescribed));
  EXPECT_EQ(KnownTasks().back(), "d4 of a program");
  ASSERT_OK_AND_ASSIGN(const auto environment, MakeEnvironment({.task = "d4 of a program", .image_size = 48}));
  EXPECT_EQ(environment->spec().action, (ActionSpec{4, true}));
  EXPECT_EQ(environment->spec().observations, (std::vector<TensorSpec>{{"of a program", DType::kUInt8, {48, 48, 3}}}));
  ASSERT_OK_AND_ASSIGN(const auto tasks, TaskOptions(Parse("task: 'd4 of a program' action_repeat: 3")));
  EXPECT_EQ(tasks.at(0).action_repeat, 3);
  EXPECT_THAT(RegisterEnvironment("d4 of a program", MakeDescribed),
              StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("\"d4 of a program\"")));
  EXPECT_THAT(RegisterEnvironment("cartpole_balance", MakeDescribed), StatusIs(absl::StatusCode::kAlreadyExists));
  EXPECT_THAT(RegisterEnvironment("", MakeDescribed), StatusIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(RegisterEnvironment("new", nullptr), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"new\"")));
}

}  // namespace
}  // namespace orrery
