#include "tools/orrery/simulator_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "tools/orrery/program_testing.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

config::v1::Cem SmallCem() {
  config::v1::Cem cem;
  cem.set_horizon(6);
  cem.set_iterations(2);
  cem.set_candidates(20);
  cem.set_elites(4);
  return cem;
}

constexpr int kEpisodes = 2;
constexpr uint64_t kSeed = 5;

std::vector<double> PlannedReturns(const EnvironmentOptions& options, int threads) {
  std::unique_ptr<Environment> environment = MakeEnvironment(options).value();
  const std::unique_ptr<SimulatorPolicy> policy = SimulatorPolicy::Create(*environment, SmallCem(), threads).value();
  return Evaluate(*environment, *policy, kEpisodes, kSeed).value().returns;
}

std::vector<double> RandomReturns(const EnvironmentOptions& options) {
  std::unique_ptr<Environment> environment = MakeEnvironment(options).value();
  RandomPolicy policy(environment->spec().action);
  return Evaluate(*environment, policy, kEpisodes, kSeed).value().returns;
}

// Three choices; cannot look ahead.
class BlindEnvironment : public Environment {
 public:
  BlindEnvironment() { spec_.action = {.size = 3, .discrete = true}; }
  const EnvironmentSpec& spec() const override { return spec_; }
  absl::StatusOr<TimeStep> Reset(uint64_t) override { return TimeStep(); }
  absl::StatusOr<TimeStep> Step(absl::Span<const float>) override { return TimeStep(); }
  absl::StatusOr<Array> Render(int, int) override { return absl::UnimplementedError("no pictures"); }

 private:
  EnvironmentSpec spec_;
};

// The first choice fails, the second pays 1, the third nothing.
class ChoiceEnvironment : public BlindEnvironment {
 public:
  explicit ChoiceEnvironment(absl::Status failure) : failure_(std::move(failure)) {}
  absl::StatusOr<std::unique_ptr<Lookahead>> MakeLookahead() const override {
    return std::make_unique<ChoiceLookahead>(failure_);
  }

 private:
  class ChoiceLookahead : public Lookahead {
   public:
    explicit ChoiceLookahead(absl::Status failure) : failure_(std::move(failure)) {}
    absl::Status Restart() override { return absl::OkStatus(); }
    absl::StatusOr<double> Step(absl::Span<const float> action) override {
      EXPECT_EQ(action.size(), 3u);
      EXPECT_EQ(action[0] + action[1] + action[2], 1);
      if (action[0] == 1) return failure_;
      return static_cast<double>(action[1]);
    }

   private:
    const absl::Status failure_;
  };

  const absl::Status failure_;
};

TEST(SimulatorPolicy, BeatsRandomActions) {
  for (const EnvironmentOptions& options :
       {EnvironmentOptions{.task = "cartpole_balance", .action_repeat = 8, .image_size = 32, .time_limit = 80},
        EnvironmentOptions{.task = "point_pixels", .action_repeat = 2, .image_size = 32}}) {
    EXPECT_GT(Mean(PlannedReturns(options, 2)), Mean(RandomReturns(options)) + 5) << options.task;
  }
}

TEST(SimulatorPolicy, PlaysTheSameWhateverTheNumberOfThreads) {
  for (const EnvironmentOptions& options :
       {EnvironmentOptions{.task = "cartpole_swingup", .action_repeat = 8, .image_size = 32, .time_limit = 60},
        EnvironmentOptions{.task = "point_pixels", .action_repeat = 3, .image_size = 32}}) {
    const std::vector<double> alone = PlannedReturns(options, 1);
    EXPECT_NE(alone[0], alone[1]) << options.task;
    EXPECT_EQ(PlannedReturns(options, 1), alone) << options.task;
    EXPECT_EQ(PlannedReturns(options, 3), alone) << options.task;
  }
}

TEST(SimulatorPolicy, ChoosesAndAvoidsPlansThatCannotBeSimulated) {
  const ChoiceEnvironment environment(absl::OutOfRangeError("the simulation became invalid"));
  config::v1::Cem cem;
  cem.set_horizon(2);
  cem.set_iterations(4);
  cem.set_candidates(100);
  cem.set_elites(10);
  ASSERT_OK_AND_ASSIGN(const auto policy, SimulatorPolicy::Create(environment, cem, 2));
  policy->Begin(1);
  ASSERT_OK_AND_ASSIGN(const std::vector<float> action, policy->Act({}));
  EXPECT_THAT(action, ElementsAre(0, 1, 0));
}

TEST(SimulatorPolicy, ReturnsOtherErrorsOfTheSimulator) {
  const ChoiceEnvironment environment(absl::InternalError("out of memory"));
  ASSERT_OK_AND_ASSIGN(const auto policy, SimulatorPolicy::Create(environment, SmallCem(), 2));
  policy->Begin(1);
  EXPECT_THAT(policy->Act({}), StatusIs(absl::StatusCode::kInternal, HasSubstr("out of memory")));
}

TEST(SimulatorPolicy, RefusesWhatItCannotPlanWith) {
  EXPECT_THAT(SimulatorPolicy::Create(BlindEnvironment(), SmallCem(), 1),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("cannot look ahead")));
  config::v1::Cem cem = SmallCem();
  cem.set_elites(21);
  EXPECT_THAT(SimulatorPolicy::Create(ChoiceEnvironment(absl::OkStatus()), cem, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("cem.elites")));
}

Outcome Eval(const std::string& arguments) { return Orrery("eval " + arguments); }

TEST(EvalWithTheSimulator, NeedsNoSnapshotAndTakesTheConfigurationsPlanner) {
  const std::string arguments = absl::StrCat("--algorithm=simulator --json --episodes=2 --seed=3 --config=",
                                             SourceFile("configs/point_pixels.textproto"), " --set planner.cem.candidates=20");
  const Outcome outcome = Eval(arguments + " --threads=1");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  const auto evaluated = nlohmann::json::parse(outcome.output);
  EXPECT_EQ(evaluated["algorithm"], "simulator");
  EXPECT_EQ(evaluated["env"], "point_pixels");
  EXPECT_EQ(evaluated["returns"].size(), 2u);
  EXPECT_FALSE(evaluated.contains("snapshot"));
  EXPECT_EQ(Eval(arguments + " --threads=3").output, outcome.output);
  EXPECT_NE(Eval(arguments + " --set planner.cem.iterations=1").output, outcome.output);
}

TEST(EvalWithTheSimulator, RefusesAPlannerAndASnapshot) {
  struct Case {
    std::string arguments;
    std::string says;
  };
  for (const Case& bad : std::vector<Case>{
           {"--algorithm=simulator --env=point_pixels --snapshot=x", "neither --planner nor --snapshot"},
           {"--algorithm=simulator --env=point_pixels --planner=127.0.0.1:1", "neither --planner nor --snapshot"},
           {"--algorithm=simulator", "--env"},
           {"--env=point_pixels", "--algorithm=simulator"}}) {
    const Outcome outcome = Eval(bad.arguments);
    EXPECT_EQ(outcome.code, 1) << bad.arguments;
    EXPECT_THAT(outcome.output, HasSubstr("orrery: error: "));
    EXPECT_THAT(outcome.output, HasSubstr(bad.says));
  }
}

}  // namespace
}  // namespace orrery
