#include "libs/serving/engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/serving/snapshot_holder.h"
#include "libs/serving/testing.h"

namespace orrery {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::Le;
using ::testing::SizeIs;

using Outputs = std::vector<absl::StatusOr<SlotOutput>>;

class EngineTest : public ::testing::Test {
 protected:
  // Tests run side by side, and models this small gain nothing from more threads.
  EngineTest() { torch::set_num_threads(1); }
  void Serve(const std::string& file) {
    ASSERT_OK(holder_.Load(file));
    served_ = holder_.Get();
  }
  static SnapshotHolder::Options HolderOptions(std::shared_ptr<prometheus::Registry> registry) {
    SnapshotHolder::Options options;
    options.registry = std::move(registry);
    return options;
  }
  Outputs Run(const std::vector<SlotInput>& slots) {
    std::vector<const SlotInput*> pointers;
    for (const SlotInput& slot : slots) pointers.push_back(&slot);
    absl::StatusOr<Outputs> outputs = engine_.Run(*served_, pointers);
    EXPECT_OK(outputs);
    return outputs.ok() ? *std::move(outputs) : Outputs();
  }
  static SlotInput NewSlot(uint64_t seed) {
    SlotInput slot;
    slot.observations = TinyObservation(seed);
    slot.seed = seed;
    return slot;
  }
  SlotInput NextSlot(const SlotOutput& last, uint64_t seed) {
    SlotInput slot = NewSlot(seed);
    slot.previous_action = last.action;
    slot.belief = last.belief;
    return slot;
  }
  absl::Status Check(const SlotInput& slot) { return CheckSlot(*served_, slot, "slots[3]"); }

  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  SnapshotHolder holder_{HolderOptions(registry_)};
  InferenceEngine engine_{torch::kCPU, registry_};
  std::shared_ptr<const ServedModel> served_;
};

TEST_F(EngineTest, AnswersASlotInABatchAsAloneToTheLastBit) {
  Serve(TinySnapshot(1));
  std::vector<SlotInput> slots;
  for (uint64_t i = 0; i < 64; ++i) slots.push_back(NewSlot(i));
  slots[3].exploration_noise = 0.5f;
  for (int round = 0; round < 3; ++round) {
    const Outputs together = Run(slots);
    ASSERT_THAT(together, SizeIs(64));
    for (size_t i = 0; i < slots.size(); ++i) {
      const Outputs alone = Run({slots[i]});
      ASSERT_OK(together[i]);
      ASSERT_OK(alone[0]);
      ASSERT_THAT(together[i]->action, SizeIs(2));
      EXPECT_EQ(together[i]->action, alone[0]->action) << i;
      EXPECT_EQ(together[i]->predicted_return, alone[0]->predicted_return) << i;
      EXPECT_EQ(together[i]->belief, alone[0]->belief) << i;
    }
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = NextSlot(*together[i], 100 * (i + 1) + static_cast<uint64_t>(round));
  }
}

// A slot that is computed beside others on one thread, or alone by all of them.
TEST_F(EngineTest, AnswersTheSameWithAnyNumberOfThreads) {
  std::vector<SlotInput> slots;
  for (uint64_t i = 0; i < 7; ++i) slots.push_back(NewSlot(i));
  slots[6].exploration_noise = 0.5f;
  std::vector<Outputs> answers;
  for (const int threads : {0, 1, 2, 3}) {
    SnapshotHolder::Options options = HolderOptions(std::make_shared<prometheus::Registry>());
    if (threads > 0) options.workers = std::make_shared<RowWorkers>(threads);
    SnapshotHolder holder(options);
    ASSERT_OK(holder.Load(TinySnapshot(1)));
    served_ = holder.Get();
    answers.push_back(Run(slots));
    ASSERT_THAT(answers.back(), SizeIs(7));
    for (size_t i = 0; i < slots.size(); ++i) {
      ASSERT_OK(answers.back()[i]);
      EXPECT_EQ(answers.back()[i]->action, answers[0][i]->action) << i << " with " << threads;
      EXPECT_EQ(answers.back()[i]->belief, answers[0][i]->belief) << i << " with " << threads;
    }
  }
}

// OpenMP's helpers of a thread that computes would take the processors from the workers.
TEST_F(EngineTest, UsesTheThreadsOfLibTorchThatWereSetOnEveryThread) {
  Serve(TinySnapshot(1));
  torch::set_num_threads(5);
  int threads = 0;
  std::thread([&] {
    EXPECT_OK(Run({NewSlot(1)})[0]);
    threads = OpenMpThreads();
  }).join();
  torch::set_num_threads(1);
  EXPECT_EQ(threads, 5);
}

TEST_F(EngineTest, KeepsTheOrderOfManySlots) {
  Serve(TinySnapshot(1));
  std::vector<SlotInput> slots;
  for (uint64_t i = 0; i < 19; ++i) slots.push_back(NewSlot(i));
  const Outputs together = Run(slots);
  ASSERT_THAT(together, SizeIs(19));
  for (const size_t i : {0, 7, 8, 18}) {
    const Outputs alone = Run({slots[i]});
    ASSERT_OK(together[i]);
    for (size_t a = 0; a < 2; ++a) EXPECT_NEAR(together[i]->action[a], alone[0]->action[a], 1e-5) << i;
  }
}

TEST_F(EngineTest, DoesWhatTheModelSays) {
  Serve(TinySnapshot(1));
  const SlotInput first = NewSlot(5);
  const Outputs one = Run({first});
  ASSERT_OK(one[0]);
  const SlotInput second = NextSlot(*one[0], 6);
  const Outputs two = Run({second});
  ASSERT_OK(two[0]);
  ASSERT_OK_AND_ASSIGN(const Belief before, ParseBelief(one[0]->belief, served_->belief_shape()));
  ASSERT_OK_AND_ASSIGN(const Belief after, ParseBelief(two[0]->belief, served_->belief_shape()));

  torch::NoGradGuard no_grad;
  const LatentState state{torch::tensor(before.deter).unsqueeze(0), torch::tensor(before.stoch).unsqueeze(0)};
  const torch::Tensor deter =
      served_->model->Predict(state, torch::tensor(second.previous_action).unsqueeze(0)).deter.squeeze(0);
  for (size_t k = 0; k < after.deter.size(); ++k) {
    EXPECT_NEAR(after.deter[k], deter[static_cast<int64_t>(k)].item<float>(), 1e-6);
  }
  EXPECT_EQ(after.version, (SnapshotVersion{1, 1}));
  EXPECT_EQ(after.model, "tiny");
}

TEST_F(EngineTest, TheSeedDecidesEverythingRandom) {
  Serve(TinySnapshot(1));
  SlotInput slot = NewSlot(1);
  const Outputs first = Run({slot});
  const Outputs again = Run({slot});
  EXPECT_EQ(first[0]->action, again[0]->action);
  EXPECT_EQ(first[0]->belief, again[0]->belief);
  slot.seed = 2;
  const Outputs other = Run({slot});
  EXPECT_NE(first[0]->action, other[0]->action);
  EXPECT_NE(first[0]->belief, other[0]->belief);
}

TEST_F(EngineTest, ExplorationMovesTheActionInsideItsRange) {
  Serve(TinySnapshot(1));
  SlotInput slot = NewSlot(1);
  const std::vector<float> quiet = Run({slot})[0]->action;
  slot.exploration_noise = 10;
  const Outputs loud = Run({slot});
  EXPECT_NE(loud[0]->action, quiet);
  EXPECT_THAT(loud[0]->action, Each(AllOf(Ge(-1.0f), Le(1.0f))));
  EXPECT_THAT(quiet, Each(AllOf(Ge(-1.0f), Le(1.0f))));
}

TEST_F(EngineTest, ChecksEveryInputOfASlot) {
  Serve(TinySnapshot(1));
  EXPECT_OK(Check(NewSlot(1)));
  const auto refuse = [this](const SlotInput& slot, const char* message) {
    EXPECT_THAT(Check(slot), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  SlotInput slot = NewSlot(1);
  slot.observations["image"] = Array::Zeros(DType::kUInt8, {32, 32, 1});
  refuse(slot, "slots[3].observations \"image\" is uint8 [32, 32, 1], expected uint8 [32, 32, 3]");
  slot.observations["image"] = Array::Zeros(DType::kFloat32, {32, 32, 3});
  refuse(slot, "slots[3].observations \"image\" is float32 [32, 32, 3], expected uint8 [32, 32, 3]");
  slot.observations.erase("image");
  EXPECT_OK(Check(slot)) << "what is missing is not known at this step";
  slot.observations.clear();
  refuse(slot, "slots[3].observations is empty, expected at least one modality: \"image\", \"joints\"");
  slot = NewSlot(1);
  slot.observations["image"].bytes.pop_back();
  refuse(slot, "slots[3].observations \"image\"");
  slot = NewSlot(1);
  slot.observations["sound"] = Array::Zeros(DType::kUInt8, {1});
  refuse(slot, "unknown modality \"sound\", expected \"image\", \"joints\"");
  slot = NewSlot(1);
  slot.observations["joints"].mutable_as<float>()[1] = std::numeric_limits<float>::quiet_NaN();
  refuse(slot, "slots[3].observations \"joints\" holds nan, expected finite numbers");
  slot = NewSlot(1);
  slot.previous_action = {0.5f};
  refuse(slot, "slots[3].previous_action has 1 values, expected 2");
  slot.previous_action = {0.5f, 1.5f};
  refuse(slot, "slots[3].previous_action holds 1.5, expected -1 to 1");
  slot = NewSlot(1);
  slot.exploration_noise = -1;
  refuse(slot, "slots[3].exploration_noise is -1, expected 0 to 10");
  slot.exploration_noise = std::numeric_limits<float>::quiet_NaN();
  refuse(slot, "slots[3].exploration_noise is nan");
  slot = NextSlot(*Run({NewSlot(1)})[0], 2);
  EXPECT_OK(Check(slot));
  slot.belief.pop_back();
  refuse(slot, "slots[3]: belief");
  slot = NextSlot(*Run({NewSlot(1)})[0], 2);
  slot.previous_action.clear();
  refuse(slot, "slots[3].previous_action is empty beside a belief");
}

TEST_F(EngineTest, AnOverflowingSlotFailsAlone) {
  Serve(TinySnapshot(1));
  SlotInput huge = NewSlot(1);
  for (float& value : huge.observations["joints"].mutable_as<float>()) value = std::numeric_limits<float>::max();
  ASSERT_OK(Check(huge));
  const Outputs outputs = Run({NewSlot(2), huge});
  ASSERT_THAT(outputs, SizeIs(2));
  EXPECT_OK(outputs[0]);
  EXPECT_THAT(outputs[1], StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(EngineTest, NewerWeightsOfTheSameStructureTakeAnOldBelief) {
  Serve(TinySnapshot(1, 1));
  const SlotInput next = NextSlot(*Run({NewSlot(1)})[0], 2);
  const Outputs before = Run({next});
  Serve(TinySnapshot(50, 2));
  ASSERT_OK(Check(next));
  const Outputs after = Run({next});
  ASSERT_OK(after[0]);
  EXPECT_NE(before[0]->action, after[0]->action);
  Serve(TinySnapshot(51, 3, TinyModel(24)));
  EXPECT_THAT(Check(next), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("begin a new belief")));
}

TEST_F(EngineTest, WarmsUp) {
  Serve(TinySnapshot(1));
  EXPECT_OK(engine_.WarmUp(*served_, InferenceEngine::WarmUpsOn(torch::kCPU, 16)));
}

TEST_F(EngineTest, EverySizeThatIsRecordedIsWarmedUpSoOften) {
  const auto sizes = [](int64_t max_batch) { return InferenceEngine::WarmUpsOn({torch::kCUDA, 0}, max_batch).sizes; };
  EXPECT_THAT(sizes(1), ElementsAre(1));
  EXPECT_THAT(sizes(2), ElementsAre(1, 2));
  EXPECT_THAT(sizes(5), ElementsAre(1, 2, 4, 8));
  EXPECT_THAT(sizes(16), ElementsAre(1, 2, 4, 8, 16));
  EXPECT_EQ(InferenceEngine::WarmUpsOn({torch::kCUDA, 0}, 16).runs, 3) << "two ordinary runs and the one that records";
  EXPECT_THAT(InferenceEngine::WarmUpsOn(torch::kCPU, 16).sizes, ElementsAre(1));
  EXPECT_EQ(InferenceEngine::WarmUpsOn(torch::kCPU, 16).runs, 1);
}

// Writes down what it plans for.
class CountingPlanner : public Planner {
 public:
  CountingPlanner(std::unique_ptr<Planner> planner, std::vector<std::string>* planned)
      : planner_(std::move(planner)), planned_(planned) {}
  absl::StatusOr<PlanResult> Plan(const WorldModel& model, const PlanRequest& request) const override {
    planned_->push_back(absl::StrCat(request.seeds.size(), request.valid_actions.defined() ? " of valid actions" : ""));
    return planner_->Plan(model, request);
  }

 private:
  const std::unique_ptr<Planner> planner_;
  std::vector<std::string>* const planned_;
};

TEST_F(EngineTest, WarmsUpWholeBatchesOfEachSizeAndKind) {
  const auto planned = [this](const config::v1::Model& model) {
    Serve(TinySnapshot(served_ == nullptr ? 1 : 2, 1, model));
    std::vector<std::string> calls;
    ServedModel counted;
    counted.name = served_->name;
    counted.version = served_->version;
    counted.info = served_->info;
    counted.model = served_->model;
    counted.structure_hash = served_->structure_hash;
    counted.planner = std::make_unique<CountingPlanner>(MakePlanner(TinyPlanner(), model).value(), &calls);
    EXPECT_OK(engine_.WarmUp(counted, {.sizes = {1, 4}, .runs = 2}));
    return calls;
  };
  EXPECT_THAT(planned(TinyModel()), ElementsAre("1", "1", "4", "4"));
  EXPECT_THAT(planned(TinyDiscreteModel()),
              ElementsAre("1", "1", "4", "4", "1 of valid actions", "1 of valid actions", "4 of valid actions",
                          "4 of valid actions"));
}

TEST_F(EngineTest, TakesNoValidActionsForAContinuousAction) {
  Serve(TinySnapshot(1));
  SlotInput slot = NewSlot(1);
  slot.valid_actions = {1, 1};
  EXPECT_THAT(Check(slot), StatusIs(absl::StatusCode::kInvalidArgument,
                                    HasSubstr("slots[3].valid_actions has 2 values, expected none: the action is continuous")));
}

// A planner that begins from the plan of the call before.
class WarmStartTest : public EngineTest {
 protected:
  void ServeHorizon(int64_t counter, int horizon) {
    config::v1::Planner planner = TinyPlanner();
    planner.mutable_cem()->set_warm_start(true);
    planner.mutable_cem()->set_horizon(horizon);
    Serve(TinySnapshot(counter, /*seed=*/1, TinyModel(), planner));
  }
  Belief Parse(const std::string& token) {
    const absl::StatusOr<Belief> belief = ParseBelief(token, served_->belief_shape());
    EXPECT_OK(belief);
    return belief.value_or(Belief());
  }
  // The slot with its belief's plan taken out.
  SlotInput WithoutPlan(SlotInput slot) {
    Belief belief = Parse(slot.belief);
    belief.plan_horizon = 0;
    belief.plan.clear();
    slot.belief = SerializeBelief(belief).value();
    return slot;
  }
};

TEST_F(WarmStartTest, ThePlanTravelsInTheBelief) {
  ServeHorizon(1, 4);
  const Outputs first = Run({NewSlot(1)});
  ASSERT_OK(first[0]);
  const Belief belief = Parse(first[0]->belief);
  EXPECT_EQ(belief.plan_horizon, 4);
  ASSERT_THAT(belief.plan, SizeIs(4 * 2));
  EXPECT_EQ(belief.plan[6], belief.plan[4]) << "the last action is repeated";
  EXPECT_EQ(belief.plan[7], belief.plan[5]);
  const SlotInput next = NextSlot(*first[0], 2);
  ASSERT_OK(Check(next));
  const Outputs warm = Run({next}), cold = Run({WithoutPlan(next)});
  ASSERT_OK(warm[0]);
  ASSERT_OK(cold[0]);
  EXPECT_NE(warm[0]->action, cold[0]->action);
  const Belief one = Parse(warm[0]->belief), other = Parse(cold[0]->belief);
  EXPECT_EQ(one.deter, other.deter);
  EXPECT_EQ(one.stoch, other.stoch);
  EXPECT_NE(one.plan, other.plan);
}

TEST_F(WarmStartTest, AnswersASlotInABatchAsAloneWhetherItHasAPlanOrNot) {
  ServeHorizon(1, 4);
  const Outputs first = Run({NewSlot(1), NewSlot(2)});
  const std::vector<SlotInput> slots = {NextSlot(*first[0], 3), WithoutPlan(NextSlot(*first[1], 4)), NewSlot(5)};
  const Outputs together = Run(slots);
  for (size_t i = 0; i < slots.size(); ++i) {
    const Outputs alone = Run({slots[i]});
    ASSERT_OK(together[i]);
    for (size_t a = 0; a < 2; ++a) EXPECT_NEAR(together[i]->action[a], alone[0]->action[a], 1e-5) << i;
  }
}

TEST_F(WarmStartTest, BeginsAnewWhenThePlannerHasChanged) {
  ServeHorizon(1, 4);
  const Outputs first = Run({NewSlot(1)});
  const SlotInput next = NextSlot(*first[0], 2), without = WithoutPlan(next);
  ServeHorizon(2, 5);
  ASSERT_OK(Check(next));
  EXPECT_EQ(Run({next})[0]->action, Run({without})[0]->action) << "a plan of another horizon";
  Serve(TinySnapshot(3));
  ASSERT_OK(Check(next));
  const Outputs cold = Run({next});
  EXPECT_EQ(cold[0]->action, Run({without})[0]->action) << "a planner that wants none";
  EXPECT_EQ(cold[0]->belief[4], 1) << "and makes none";
}

class DiscreteEngineTest : public EngineTest {
 protected:
  void SetUp() override { ServePlanner("random {}"); }
  void ServePlanner(const std::string& text) {
    ASSERT_OK_AND_ASSIGN(const config::v1::Planner planner, ParsePlanner(text));
    Serve(TinySnapshot(++counter_, /*seed=*/1, TinyDiscreteModel(), planner));
  }

  int64_t counter_ = 0;
};

TEST_F(DiscreteEngineTest, AnswersOneHotWithAndWithoutExploration) {
  std::set<size_t> chosen;
  for (uint64_t seed = 0; seed < 30; ++seed) {
    SlotInput slot = NewSlot(seed);
    slot.exploration_noise = seed % 2 == 0 ? 1.0f : 0.0f;
    const Outputs outputs = Run({slot});
    ASSERT_OK(outputs[0]);
    const std::vector<float>& action = outputs[0]->action;
    ASSERT_THAT(action, SizeIs(3));
    EXPECT_EQ(std::count(action.begin(), action.end(), 1.0f), 1);
    EXPECT_EQ(std::count(action.begin(), action.end(), 0.0f), 2);
    chosen.insert(static_cast<size_t>(std::find(action.begin(), action.end(), 1.0f) - action.begin()));
  }
  EXPECT_THAT(chosen, SizeIs(3));
}

TEST_F(DiscreteEngineTest, KeepsToTheValidActions) {
  for (const char* planner : {"random {}", "cem { horizon: 2 iterations: 2 candidates: 16 elites: 4 warm_start: true }",
                              "genetic { horizon: 2 generations: 3 population: 4 simulations: 2 }",
                              "random_shooting { horizon: 2 candidates: 16 }"}) {
    ServePlanner(planner);
    std::set<size_t> chosen;
    for (uint64_t seed = 0; seed < 40; ++seed) {
      SlotInput slot = NewSlot(seed);
      slot.exploration_noise = seed % 2 == 0 ? 1.0f : 0.0f;
      slot.valid_actions = {1, 0, 1};
      ASSERT_OK(Check(slot));
      const Outputs outputs = Run({slot});
      ASSERT_OK(outputs[0]);
      const std::vector<float>& action = outputs[0]->action;
      chosen.insert(static_cast<size_t>(std::find(action.begin(), action.end(), 1.0f) - action.begin()));
      // The plan that the belief may carry must not lead to what is valid no longer.
      SlotInput next = NextSlot(*outputs[0], seed + 100);
      next.valid_actions = {0, 1, 0};
      const Outputs after = Run({next});
      ASSERT_OK(after[0]);
      EXPECT_EQ(after[0]->action, std::vector<float>({0, 1, 0})) << planner;
    }
    EXPECT_THAT(chosen, ElementsAre(0u, 2u)) << planner;
  }
}

TEST_F(DiscreteEngineTest, OnlyTheSlotWithAMaskIsMasked) {
  std::set<size_t> chosen;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    SlotInput masked = NewSlot(seed);
    masked.valid_actions = {0, 0, 1};
    const Outputs outputs = Run({masked, NewSlot(seed)});
    ASSERT_OK(outputs[0]);
    ASSERT_OK(outputs[1]);
    EXPECT_EQ(outputs[0]->action, std::vector<float>({0, 0, 1}));
    const std::vector<float>& action = outputs[1]->action;
    chosen.insert(static_cast<size_t>(std::find(action.begin(), action.end(), 1.0f) - action.begin()));
    EXPECT_EQ(Run({NewSlot(seed)})[0]->action, action) << "as alone";
  }
  EXPECT_THAT(chosen, SizeIs(3));
}

TEST_F(DiscreteEngineTest, ChecksValidActions) {
  const auto invalid = [this](const SlotInput& slot, const char* message) {
    EXPECT_THAT(Check(slot), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  SlotInput slot = NewSlot(1);
  slot.valid_actions = {0, 0, 1};
  EXPECT_OK(Check(slot));
  slot.valid_actions = {0, 0, 0};
  invalid(slot, "slots[3].valid_actions allows no action, expected at least one");
  slot.valid_actions = {1, 1};
  invalid(slot, "slots[3].valid_actions has 2 values, expected 3");
  slot.valid_actions = {1, 1, 1, 1};
  invalid(slot, "slots[3].valid_actions has 4 values, expected 3");
}

TEST_F(DiscreteEngineTest, ChecksOneHotActions) {
  SlotInput slot = NewSlot(1);
  slot.exploration_noise = 1.5f;
  EXPECT_THAT(Check(slot), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("expected 0 to 1")));
  slot.exploration_noise = 0;
  slot.previous_action = {0, 1, 0};
  EXPECT_OK(Check(slot));
  slot.previous_action = {0, 1, 1};
  EXPECT_THAT(Check(slot), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("one-hot")));
  slot.previous_action = {0, 0.5f, 0};
  EXPECT_THAT(Check(slot), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("one-hot")));
}

}  // namespace
}  // namespace orrery
