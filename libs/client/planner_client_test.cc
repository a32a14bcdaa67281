#include "libs/client/planner_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/status_matchers.h"
#include "libs/client/channel.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;

// Answers with the statuses of a script, in order, then OK.
class ScriptedPlanner : public planner::v1::PlannerService::Service {
 public:
  grpc::Status Act(grpc::ServerContext* context, const planner::v1::ActRequest* request,
                   planner::v1::ActResponse* response) override {
    const size_t call = calls++;
    while (call < hung_calls && !context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
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
  size_t hung_calls = 0;
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
const grpc::Status kNoMemory(grpc::StatusCode::INTERNAL, "inference: out of memory");
const grpc::Status kProxy(grpc::StatusCode::UNKNOWN, "Stream removed");

TEST_F(PlannerClientTest, TriesAgainWhileThePlannerIsAwayOrFull) {
  planner_.script = {kAway, kFull, grpc::Status::CANCELLED, kAway};
  ASSERT_OK_AND_ASSIGN(const auto response, client_.Act(request_, Soon()));
  EXPECT_EQ(response.results_size(), 2);
  EXPECT_EQ(planner_.calls, 5u);
}

TEST_F(PlannerClientTest, TriesAgainAfterWhatOneCallMayHaveSufferedAlone) {
  planner_.script = {kNoMemory, kProxy};
  ASSERT_OK_AND_ASSIGN(const auto response, client_.Act(request_, Soon()));
  EXPECT_EQ(response.results_size(), 2);
  EXPECT_EQ(planner_.calls, 3u);
}

TEST_F(PlannerClientTest, ReturnsOtherErrorsAtOnce) {
  planner_.script = {grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "begin a new belief")};
  EXPECT_THAT(client_.Act(request_, Soon()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("begin a new belief")));
  EXPECT_EQ(planner_.calls, 1u);
}

TEST_F(PlannerClientTest, ReturnsTheLastErrorAtTheDeadline) {
  for (const grpc::Status& error : {kFull, kNoMemory}) {
    planner_.script = std::vector<grpc::Status>(1000, error);
    planner_.calls = 0;
    EXPECT_THAT(client_.Act(request_, absl::Now() + absl::Milliseconds(150)),
                StatusIs(static_cast<absl::StatusCode>(error.error_code()), HasSubstr(error.error_message())));
    EXPECT_GT(planner_.calls, 1u);
  }
}

// It takes the call and does not answer it.
TEST_F(PlannerClientTest, APlannerThatHangsLeavesTimeForAnother) {
  planner_.hung_calls = 1;
  ASSERT_OK_AND_ASSIGN(const auto response, client_.Act(request_, absl::Now() + 2 * PlannerClient::kShortestTry));
  EXPECT_EQ(response.results_size(), 2);
  EXPECT_EQ(planner_.calls, 2u);
}

TEST_F(PlannerClientTest, RefusesAnAnswerOfAnotherNumberOfSlots) {
  planner_.missing_results = 1;
  EXPECT_THAT(client_.Act(request_, Soon()),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("answered 1 slots, expected 2")));
  EXPECT_EQ(planner_.calls, 1u);
}

TEST_F(PlannerClientTest, GetModelTriesAgainToo) {
  planner_.script = {kAway};
  ASSERT_OK_AND_ASSIGN(const auto model, client_.GetModel("cartpole", Soon()));
  EXPECT_EQ(model.model(), "cartpole");
  EXPECT_EQ(planner_.calls, 2u);
}

// Two replicas behind one name, of which one is always full: every call gets its answer from the other.
TEST(PlannerClient, AsksAnotherReplica) {
  ScriptedPlanner full, idle;
  full.script = std::vector<grpc::Status>(10000, kFull);
  std::vector<std::unique_ptr<grpc::Server>> servers;
  std::string target = "ipv4:";
  for (ScriptedPlanner* replica : {&full, &idle}) {
    int port = 0;
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    servers.push_back(builder.RegisterService(replica).BuildAndStart());
    absl::StrAppend(&target, replica == &idle ? "," : "", "127.0.0.1:", port);
  }
  ASSERT_OK_AND_ASSIGN(auto channel, MakeChannel(target));
  PlannerClient client(std::move(channel));
  planner::v1::ActRequest request;
  request.add_slots();
  for (int i = 0; i < 10; ++i) EXPECT_OK(client.Act(request, absl::Now() + absl::Seconds(20)));
  EXPECT_EQ(idle.calls, 10u);
  EXPECT_GT(full.calls, 0u);
  for (auto& server : servers) server->Shutdown();
}

}  // namespace
}  // namespace orrery
