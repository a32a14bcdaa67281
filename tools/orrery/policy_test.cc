#include "tools/orrery/policy.h"

#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "libs/base/random.h"
#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

// Two steps an episode; the reward is the first number of the action.
class TinyEnvironment : public Environment {
 public:
  TinyEnvironment() {
    spec_.observations = {{"position", DType::kFloat32, {1}}};
    spec_.action.size = 2;
  }
  const EnvironmentSpec& spec() const override { return spec_; }
  absl::StatusOr<TimeStep> Reset(uint64_t seed) override {
    seeds.push_back(seed);
    step_ = 0;
    return At();
  }
  absl::StatusOr<TimeStep> Step(absl::Span<const float> action) override {
    step_ += 1;
    TimeStep step = At();
    step.reward = action[0];
    step.is_last = step_ == 2;
    return step;
  }
  absl::StatusOr<Array> Render(int, int) override { return absl::UnimplementedError("no pictures"); }

  std::vector<uint64_t> seeds;

 private:
  TimeStep At() const {
    TimeStep step;
    step.observation["position"] = Array::From<float>({static_cast<float>(step_)}, {1});
    return step;
  }
  EnvironmentSpec spec_;
  int step_ = 0;
};

// Serves until it is destroyed.
class FakePlanner : public planner::v1::PlannerService::Service {
 public:
  FakePlanner() : server_(grpc::ServerBuilder().RegisterService(this).BuildAndStart()) {}
  ~FakePlanner() override { server_->Shutdown(); }
  std::shared_ptr<grpc::Channel> channel() { return server_->InProcessChannel({}); }

  grpc::Status Act(grpc::ServerContext*, const planner::v1::ActRequest* request,
                   planner::v1::ActResponse* response) override {
    requests.push_back(*request);
    planner::v1::SlotResult* result = response->add_results();
    for (int i = 0; i < action_size; ++i) result->add_action(0.5f);
    result->set_belief(absl::StrCat("belief-", requests.size()));
    response->mutable_snapshot_version()->set_generation(2);
    response->mutable_snapshot_version()->set_counter(7);
    return grpc::Status::OK;
  }
  grpc::Status GetModel(grpc::ServerContext*, const planner::v1::GetModelRequest* request,
                        planner::v1::GetModelResponse* response) override {
    response->set_model(request->model());
    return grpc::Status::OK;
  }
  int action_size = 2;
  std::vector<planner::v1::ActRequest> requests;

 private:
  const std::unique_ptr<grpc::Server> server_;  // last: it calls the rest
};

TEST(Evaluate, GivesEveryPolicyTheSameSeeds) {
  TinyEnvironment first, second;
  RandomPolicy policy(first.spec().action);
  ASSERT_OK_AND_ASSIGN(const Evaluation a, Evaluate(first, policy, 3, 9));
  RandomPolicy again(first.spec().action);
  ASSERT_OK_AND_ASSIGN(const Evaluation b, Evaluate(second, again, 3, 9));
  EXPECT_EQ(first.seeds, (std::vector<uint64_t>{DeriveSeed(9, "evaluation", 0), DeriveSeed(9, "evaluation", 1),
                                                DeriveSeed(9, "evaluation", 2)}));
  EXPECT_EQ(first.seeds, second.seeds);
  EXPECT_EQ(a.returns, b.returns);
  EXPECT_NE(a.returns[0], a.returns[1]);
  EXPECT_EQ(a.rows, (std::vector<int64_t>{3, 3, 3}));
}

TEST(PlannerPolicy, CarriesTheBeliefThroughAnEpisodeAndAsksForNoNoise) {
  FakePlanner planner;
  TinyEnvironment environment;
  PlannerPolicy policy(planner.channel(), environment.spec().action);
  ASSERT_OK_AND_ASSIGN(const Evaluation evaluation, Evaluate(environment, policy, 2, 1));
  EXPECT_EQ(evaluation.returns, (std::vector<double>{1.0, 1.0}));
  EXPECT_EQ(policy.version(), (SnapshotVersion{2, 7}));
  ASSERT_EQ(planner.requests.size(), 4u);
  const std::vector<std::string> beliefs = {"", "belief-1", "", "belief-3"};
  for (int i = 0; i < 4; ++i) {
    const planner::v1::Slot& slot = planner.requests[i].slots(0);
    EXPECT_EQ(slot.belief(), beliefs[i]);
    EXPECT_EQ(slot.previous_action_size(), beliefs[i].empty() ? 0 : 2);
    EXPECT_EQ(slot.exploration_noise(), 0);
    EXPECT_TRUE(slot.has_seed());
    EXPECT_EQ(planner.requests[i].priority(), planner::v1::EVALUATION);
  }
  EXPECT_NE(planner.requests[0].slots(0).seed(), planner.requests[1].slots(0).seed());
}

TEST(PlannerPolicy, AsksForItsModel) {
  FakePlanner planner;
  TinyEnvironment environment;
  PlannerPolicy policy(planner.channel(), environment.spec().action, "challenger");
  ASSERT_OK(Evaluate(environment, policy, 1, 1));
  ASSERT_OK_AND_ASSIGN(const planner::v1::GetModelResponse model, policy.Model());
  EXPECT_EQ(model.model(), "challenger");
  ASSERT_EQ(planner.requests.size(), 2u);
  for (const auto& request : planner.requests) EXPECT_EQ(request.model(), "challenger");
}

TEST(BlindPolicy, HidesModalities) {
  FakePlanner planner;
  TinyEnvironment environment;
  PlannerPolicy seeing(planner.channel(), environment.spec().action);
  BlindPolicy blind(seeing, {"position"});
  ASSERT_OK(Evaluate(environment, blind, 1, 1));
  ASSERT_EQ(planner.requests.size(), 2u);
  for (const auto& request : planner.requests) EXPECT_EQ(request.slots(0).observations_size(), 0);
  EXPECT_EQ(planner.requests[1].slots(0).belief(), "belief-1");
}

TEST(PlannerPolicy, RefusesAnActionOfAnotherSize) {
  FakePlanner planner;
  planner.action_size = 3;
  TinyEnvironment environment;
  PlannerPolicy policy(planner.channel(), environment.spec().action);
  EXPECT_THAT(Evaluate(environment, policy, 1, 1),
              StatusIs(absl::StatusCode::kInternal, testing::HasSubstr("3 numbers, expected 1 with 2")));
}

TEST(Mean, AndSampleDeviation) {
  EXPECT_DOUBLE_EQ(Mean({1, 2, 6}), 3);
  EXPECT_DOUBLE_EQ(SampleDeviation({1, 2, 6}), std::sqrt((4 + 1 + 9) / 2.0));
  EXPECT_EQ(SampleDeviation({5}), 0);
}

}  // namespace
}  // namespace orrery
