#include "libs/client/planner_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "absl/time/clock.h"
#include "libs/base/status_matchers.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

// Answers with the statuses of a script, in order, then OK.
class ScriptedPlanner : public planner::v1::PlannerService::Service {
 public:
  grpc::Status Act(grpc::ServerContext*, const planner::v1::ActRequest* request,
                   planner::v1::ActResponse* response) override {
    const size_t call = calls++;
    if (call < script.size()) return script[call];
    for (int i = 0; i < request->slots_size() - missing_results; ++i) response->add_results()->add_action(0.5f);
    return grpc::Status::OK;
  }
  grpc::Status GetModel(grpc::ServerContext*, const planner::v1::GetModelRequest* request,
                        planner::v1::GetModelResponse* response) override {
    const size_t call = calls++;
    if (call < script.size()) return script[call];
    response->set_model(request->model());
    return grpc::Status::OK;
  }

  std::vector<grpc::Status> script;
  int missing_results = 0;
  std::atomic<size_t> calls = 0;
};

class PlannerClientTest : public ::testing::Test {
 protected:
  PlannerClientTest() : server_(grpc::ServerBuilder().RegisterService(&planner_).BuildAndStart()) {
    request_.set_client_id("test");
    request_.add_slots();
    request_.add_slots();
  }
  ~PlannerClientTest() override { server_->Shutdown(); }
  static absl::Time Soon() { return absl::Now() + absl::Seconds(20); }

  ScriptedPlanner planner_;
  std::unique_ptr<grpc::Server> server_;
  PlannerClient client_{server_->InProcessChannel({})};
  planner::v1::ActRequest request_;
};

const grpc::Status kAway(grpc::StatusCode::UNAVAILABLE, "no snapshot yet");
const grpc::Status kFull(grpc::StatusCode::RESOURCE_EXHAUSTED, "the queue is full");

TEST_F(PlannerClientTest, TriesAgainWhileThePlannerIsAwayOrFull) {
  planner_.script = {kAway, kFull, kAway};
  ASSERT_OK_AND_ASSIGN(const auto response, client_.Act(request_, Soon()));
  EXPECT_EQ(response.results_size(), 2);
  EXPECT_EQ(planner_.calls, 4u);
}

TEST_F(PlannerClientTest, ReturnsOtherErrorsAtOnce) {
  planner_.script = {grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "begin a new belief")};
  EXPECT_THAT(client_.Act(request_, Soon()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("begin a new belief")));
  EXPECT_EQ(planner_.calls, 1u);
}

TEST_F(PlannerClientTest, ReturnsTheLastErrorAtTheDeadline) {
  planner_.script = std::vector<grpc::Status>(1000, kFull);
  EXPECT_THAT(client_.Act(request_, absl::Now() + absl::Milliseconds(150)),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("the queue is full")));
  EXPECT_GT(planner_.calls, 1u);
}

TEST_F(PlannerClientTest, RefusesAnAnswerOfAnotherNumberOfSlots) {
  planner_.missing_results = 1;
  EXPECT_THAT(client_.Act(request_, Soon()),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("answered 1 slots, expected 2")));
}

TEST_F(PlannerClientTest, GetModelTriesAgainToo) {
  planner_.script = {kAway};
  ASSERT_OK_AND_ASSIGN(const auto model, client_.GetModel("cartpole", Soon()));
  EXPECT_EQ(model.model(), "cartpole");
  EXPECT_EQ(planner_.calls, 2u);
}

}  // namespace
}  // namespace orrery
