#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/log_testing.h"
#include "libs/base/status_matchers.h"
#include "libs/base/trace.h"
#include "libs/client/planner_client.h"
#include "libs/client/status.h"
#include "libs/serving/testing.h"
#include "libs/telemetry/service_host.h"
#include "libs/tensors/tensors.h"
#include "services/planner/planner_service_impl.h"

namespace orrery {
namespace {

using planner::v1::ActRequest;
using planner::v1::ActResponse;
using ::testing::ContainsRegex;
using ::testing::Gt;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// Time that passes only by computing: an hour for each time that an engine of `registry` has computed.
class ComputingClock : public Clock {
 public:
  explicit ComputingClock(prometheus::Registry* registry) : registry_(registry) {}
  absl::Time Now() override {
    absl::Time now = began_;
    for (const auto& family : registry_->Collect()) {
      if (family.name != "orrery_planner_compute_seconds") continue;
      for (const auto& metric : family.metric) now += absl::Hours(static_cast<int64_t>(metric.histogram.sample_count));
    }
    return now;
  }
  bool WaitUntil(absl::CondVar& cv, absl::Mutex& mu, absl::Time deadline) override {
    cv.WaitWithTimeout(&mu, absl::Milliseconds(1));  // so that a change of this time is noticed; it decides nothing
    return Now() >= deadline;
  }

 private:
  prometheus::Registry* const registry_;
  const absl::Time began_ = absl::Now();
};

// A planner behind a real gRPC server, reached in-process.
class PlannerServiceTest : public ::testing::Test {
 protected:
  PlannerServiceTest() {
    torch::set_num_threads(1);  // tests run side by side, and models this small gain nothing from more
    options_.registry = registry_;
    options_.run = "tiny";
    options_.service.set_max_delay_micros(1000);
  }
  ~PlannerServiceTest() override {
    if (server_ == nullptr) return;
    server_->Shutdown();
    planner_->Close();
  }
  void Start(int64_t snapshot = 1) {
    ASSERT_OK_AND_ASSIGN(planner_, PlannerServer::Create(options_));
    server_ = grpc::ServerBuilder().RegisterService(planner_->service()).BuildAndStart();
    stub_ = planner::v1::PlannerService::NewStub(server_->InProcessChannel({}));
    if (snapshot > 0) {
      ASSERT_OK(planner_->snapshots().Load(TinySnapshot(snapshot)));
    }
  }

  static void AddSlot(ActRequest& request, uint64_t seed, const planner::v1::SlotResult* last = nullptr) {
    planner::v1::Slot& slot = *request.add_slots();
    for (const auto& [name, array] : TinyObservation(seed)) {
      common::v1::NamedTensor& observation = *slot.add_observations();
      observation.set_name(name);
      *observation.mutable_tensor() = ToProto(array);
    }
    slot.set_seed(seed);
    slot.set_exploration_noise(0.1f);
    if (last == nullptr) return;
    *slot.mutable_previous_action() = last->action();
    slot.set_belief(last->belief());
  }
  static ActRequest Request(const std::string& client, uint64_t seed, const planner::v1::SlotResult* last = nullptr) {
    ActRequest request;
    request.set_client_id(client);
    AddSlot(request, seed, last);
    return request;
  }
  absl::StatusOr<ActResponse> Act(const ActRequest& request, absl::Duration timeout = absl::Seconds(60)) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    ActResponse response;
    const grpc::Status status = stub_->Act(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
    return response;
  }
  // The answers to requests that are sent at the same time.
  std::vector<ActResponse> ActTogether(const std::vector<ActRequest>& requests) {
    std::vector<ActResponse> responses(requests.size());
    std::vector<std::thread> threads;
    for (size_t i = 0; i < requests.size(); ++i) {
      threads.emplace_back([&, i] {
        absl::StatusOr<ActResponse> response = Act(requests[i]);
        EXPECT_OK(response);
        if (response.ok()) responses[i] = *std::move(response);
      });
    }
    for (std::thread& thread : threads) thread.join();
    return responses;
  }
  void ExpectRefused(const ActRequest& request, absl::StatusCode code, const std::string& message) {
    EXPECT_THAT(Act(request), StatusIs(code, HasSubstr(message)));
  }
  static void ExpectSame(const planner::v1::SlotResult& a, const planner::v1::SlotResult& b) {
    ASSERT_EQ(a.action_size(), b.action_size());
    for (int i = 0; i < a.action_size(); ++i) EXPECT_EQ(a.action(i), b.action(i));
    EXPECT_EQ(a.predicted_return(), b.predicted_return());
    EXPECT_EQ(a.belief(), b.belief());
  }
  // The metric of this model, where it has such a label, and answer.
  prometheus::ClientMetric Metric(const std::string& name, const std::string& code = "", const std::string& model = "tiny") {
    const auto fits = [&](const prometheus::ClientMetric& metric) {
      return std::all_of(metric.label.begin(), metric.label.end(), [&](const auto& label) {
        return label.value == (label.name == "model" ? model : code);
      });
    };
    for (const auto& family : registry_->Collect()) {
      if (family.name != name) continue;
      const auto metric = std::find_if(family.metric.begin(), family.metric.end(), fits);
      if (metric != family.metric.end()) return *metric;
    }
    ADD_FAILURE() << "no metric " << name << " " << code << " " << model;
    return {};
  }
  planner::v1::ModelState State(const std::string& model = "") {
    grpc::ClientContext context;
    planner::v1::ListModelsResponse response;
    EXPECT_OK(FromGrpc(stub_->ListModels(&context, {}, &response)));
    for (const planner::v1::ModelState& state : response.models()) {
      if (model.empty() || state.model() == model) return state;
    }
    ADD_FAILURE() << "no model " << model;
    return {};
  }
  absl::StatusOr<planner::v1::RollbackResponse> Rollback(const planner::v1::RollbackRequest& request = {}) {
    grpc::ClientContext context;
    planner::v1::RollbackResponse response;
    const grpc::Status status = stub_->Rollback(&context, request, &response);
    if (!status.ok()) return FromGrpc(status);
    return response;
  }
  // Serves two models whose snapshots say the same run.
  void StartTwo() {
    options_.models = {"champion", "challenger"};
    ASSERT_NO_FATAL_FAILURE(Start(/*snapshot=*/0));
    ASSERT_OK(planner_->snapshots(0).Load(TinySnapshot(1, 1)));
    ASSERT_OK(planner_->snapshots(1).Load(TinySnapshot(5, 2)));
  }
  static ActRequest RequestTo(const std::string& model, uint64_t seed, const planner::v1::SlotResult* last = nullptr) {
    ActRequest request = Request("c", seed, last);
    request.set_model(model);
    return request;
  }

  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  FakeClock clock_{absl::Now()};
  ComputingClock computing_clock_{registry_.get()};
  PlannerServer::Options options_;
  std::unique_ptr<PlannerServer> planner_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<planner::v1::PlannerService::Stub> stub_;
};

TEST_F(PlannerServiceTest, AnswersEverySlotInOrder) {
  Start(7);
  ActRequest request = Request("one", 1);
  AddSlot(request, 2);
  AddSlot(request, 1);
  ASSERT_OK_AND_ASSIGN(const ActResponse response, Act(request));
  ASSERT_EQ(response.results_size(), 3);
  EXPECT_EQ(response.snapshot_version().generation(), 1);
  EXPECT_EQ(response.snapshot_version().counter(), 7);
  for (const auto& result : response.results()) {
    EXPECT_EQ(result.action_size(), 2);
    EXPECT_FALSE(result.belief().empty());
  }
  EXPECT_NEAR(response.results(0).action(0), response.results(2).action(0), 1e-5);
  EXPECT_NE(response.results(0).action(0), response.results(1).action(0));
  EXPECT_EQ(Metric("orrery_planner_requests_total", "OK").counter.value, 1);
  EXPECT_EQ(Metric("orrery_planner_act_seconds").histogram.sample_count, 1u);
  EXPECT_EQ(Metric("orrery_planner_queue_seconds").histogram.sample_count, 1u);
  EXPECT_EQ(Metric("orrery_planner_snapshot_version").gauge.value, 7);
}

TEST_F(PlannerServiceTest, LogsInTheTraceOfTheCall) {
  CapturedLog captured("debug");
  ASSERT_OK_AND_ASSIGN(planner_, PlannerServer::Create(options_));
  HostOptions host_options;
  host_options.name = "planner";
  host_options.registry = registry_;
  host_options.services = {planner_->service()};
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ServiceHost> host, ServiceHost::Start(host_options));
  ASSERT_OK(planner_->snapshots().Load(TinySnapshot(1)));
  ASSERT_OK(planner_->snapshots().Load(TinySnapshot(2)));
  PlannerClient client(host->InProcessChannel());
  const TraceContext answered = NewTrace(), refused = NewTrace(), back = NewTrace();
  {
    const TraceScope trace(answered);
    EXPECT_OK(client.Act(Request("one", 1), absl::Now() + absl::Seconds(60)));
  }
  {
    const TraceScope trace(refused);
    EXPECT_THAT(client.Act(Request("", 1), absl::Now() + absl::Seconds(60)), StatusIs(absl::StatusCode::kInvalidArgument));
  }
  {
    const TraceScope trace(back);
    EXPECT_OK(client.Rollback({}, absl::Now() + absl::Seconds(60)));
  }
  host->Shutdown(absl::Seconds(60));
  planner_->Close();
  const std::string log = captured.Take();
  const std::string act = "call ended method=/orrery.planner.v1.PlannerService/Act code=";
  EXPECT_THAT(log, ContainsRegex(absl::StrCat("D test\\] ", act, "OK seconds=[0-9.]+ trace_id=",
                                              answered.trace_id(), "\n")));
  EXPECT_THAT(log, ContainsRegex(absl::StrCat("W test\\] ", act,
                                              "INVALID_ARGUMENT seconds=[0-9.]+ error=\"client_id has 0 [^\n]*\" trace_id=",
                                              refused.trace_id(), "\n")));
  EXPECT_THAT(log, ContainsRegex(absl::StrCat("snapshot rolled back [^\n]* trace_id=", back.trace_id(), "\n")));
}

TEST_F(PlannerServiceTest, EightConcurrentClientsShareBatchesAndGetTheAnswersTheyGetAlone) {
  constexpr int kClients = 8;
  constexpr int kRounds = 10;
  // Long enough for slow machines; batches begin as soon as all clients wait.
  options_.service.set_max_delay_micros(500000);
  options_.threads = 3;  // two by three side by side, then two with the help of all; alone with the help of all
  Start();
  std::vector<std::vector<std::pair<ActRequest, ActResponse>>> played(kClients);
  std::vector<std::thread> threads;
  for (size_t c = 0; c < kClients; ++c) {
    threads.emplace_back([&, c] {
      PlannerClient client(server_->InProcessChannel({}));
      const planner::v1::SlotResult* last = nullptr;
      for (uint64_t round = 0; round < kRounds; ++round) {
        const ActRequest request = Request(absl::StrCat("client", c), c * 1000 + round, last);
        absl::StatusOr<ActResponse> response = client.Act(request, absl::Now() + absl::Seconds(60));
        ASSERT_OK(response);
        played[c].reserve(kRounds);  // so that `last` stays valid
        played[c].emplace_back(request, *std::move(response));
        last = &played[c].back().second.results(0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const prometheus::ClientMetric::Histogram sizes = Metric("orrery_planner_batch_size").histogram;
  EXPECT_EQ(sizes.sample_sum, kClients * kRounds);
  EXPECT_THAT(sizes.sample_sum / static_cast<double>(sizes.sample_count), Gt(4));
  EXPECT_GT(Metric("orrery_planner_busy_seconds_total").counter.value, 0);

  // The same requests one by one.
  for (const auto& client : played) {
    ASSERT_THAT(client, SizeIs(kRounds));
    for (auto [request, together] : client) {
      request.set_client_id("alone");  // not one of those that the planner knows and waits for
      ASSERT_OK_AND_ASSIGN(const ActResponse alone, Act(request));
      ExpectSame(together.results(0), alone.results(0));
    }
  }
}

TEST_F(PlannerServiceTest, ServesNothingWithoutASnapshot) {
  Start(/*snapshot=*/0);
  ExpectRefused(Request("c", 1), absl::StatusCode::kUnavailable, "no snapshot yet");
  grpc::ClientContext context;
  planner::v1::GetModelResponse response;
  EXPECT_THAT(FromGrpc(stub_->GetModel(&context, {}, &response)), StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(Metric("orrery_planner_requests_total", "UNAVAILABLE").counter.value, 1);
}

TEST_F(PlannerServiceTest, DescribesTheModel) {
  Start(3);
  grpc::ClientContext context;
  planner::v1::GetModelResponse response;
  ASSERT_OK(FromGrpc(stub_->GetModel(&context, {}, &response)));
  EXPECT_EQ(response.model(), "tiny");
  EXPECT_EQ(response.snapshot_version().counter(), 3);
  EXPECT_EQ(response.structure_hash(), planner_->snapshots().Get()->structure_hash);
  ASSERT_OK_AND_ASSIGN(const config::v1::Model model, ParseModel(response.model_config()));
  EXPECT_EQ(model.deterministic_size(), 16);
  grpc::ClientContext other;
  planner::v1::GetModelRequest request;
  request.set_model("huge");
  EXPECT_THAT(FromGrpc(stub_->GetModel(&other, request, &response)),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("\"huge\" is not served here, expected \"tiny\"")));
}

TEST_F(PlannerServiceTest, RefusesBadRequestsByName) {
  Start();
  const auto invalid = absl::StatusCode::kInvalidArgument;
  ActRequest request = Request("", 1);
  ExpectRefused(request, invalid, "client_id has 0 characters, expected 1 to 128");
  request = Request(std::string(129, 'x'), 1);
  ExpectRefused(request, invalid, "client_id has 129 characters");
  request = Request("c", 1);
  request.set_model("tiny");
  EXPECT_OK(Act(request));
  request.set_model("other");
  ExpectRefused(request, absl::StatusCode::kNotFound, "model \"other\" is not served here, expected \"tiny\"");
  request = Request("c", 1);
  request.set_priority(static_cast<planner::v1::Priority>(9));
  ExpectRefused(request, invalid, "priority 9 is unknown");
  request.clear_slots();
  request.clear_priority();
  ExpectRefused(request, invalid, "request has 0 slots, expected 1 to 256");
  for (int i = 0; i < 257; ++i) request.add_slots();
  ExpectRefused(request, invalid, "request has 257 slots, expected 1 to 256");
}

TEST_F(PlannerServiceTest, RefusesBadSlotsByNumberAndNothingElseSuffers) {
  Start();
  const auto invalid = absl::StatusCode::kInvalidArgument;
  const auto with = [](const std::function<void(planner::v1::Slot&)>& change) {
    ActRequest request = Request("c", 1);
    AddSlot(request, 2);
    change(*request.mutable_slots(1));
    return request;
  };
  const auto image = [](planner::v1::Slot& slot) { return slot.mutable_observations(0)->mutable_tensor(); };
  ExpectRefused(with([&](auto& s) { image(s)->set_shape(2, 1), image(s)->mutable_data()->resize(32 * 32); }), invalid,
                "slots[1].observations \"image\" is uint8 [32, 32, 1], expected uint8 [32, 32, 3]");
  ExpectRefused(with([&](auto& s) { image(s)->set_data_type(common::v1::FLOAT32), image(s)->mutable_data()->resize(4 * 32 * 32 * 3); }),
                invalid, "slots[1].observations \"image\" is float32 [32, 32, 3], expected uint8 [32, 32, 3]");
  ExpectRefused(with([&](auto& s) { image(s)->mutable_data()->pop_back(); }), invalid, "slots[1].observations \"image\"");
  ExpectRefused(with([&](auto& s) { image(s)->set_data_type(static_cast<common::v1::DataType>(77)); }), invalid, "slots[1]");
  ExpectRefused(with([&](auto& s) { image(s)->set_shape(0, -1); }), invalid, "slots[1]");
  ExpectRefused(with([](auto& s) { s.clear_observations(); }), invalid,
                "slots[1].observations is empty, expected at least one modality");
  ExpectRefused(with([](auto& s) { *s.add_observations() = s.observations(0); }), invalid,
                "slots[1].observations: modality \"image\" comes twice");
  ExpectRefused(with([](auto& s) { s.add_previous_action(0); }), invalid, "slots[1].previous_action has 1 values, expected 2");
  ExpectRefused(with([](auto& s) { s.set_exploration_noise(11); }), invalid, "slots[1].exploration_noise is 11");
  ExpectRefused(with([](auto& s) { s.add_valid_actions(true); }), invalid,
                "slots[1].valid_actions has 1 values, expected none: the action is continuous");
  ExpectRefused(with([](auto& s) { s.set_belief("not a belief"); s.add_previous_action(0); s.add_previous_action(0); }),
                invalid, "slots[1]: belief has the wrong size");
  EXPECT_EQ(Metric("orrery_planner_requests_total", "INVALID_ARGUMENT").counter.value, 11);
  EXPECT_OK(Act(Request("c", 1)));
}

TEST_F(PlannerServiceTest, KeepsToTheValidActionsOfASlot) {
  Start(/*snapshot=*/0);
  ASSERT_OK(planner_->snapshots().Load(TinySnapshot(1, /*seed=*/1, TinyDiscreteModel())));
  for (int valid = 0; valid < 3; ++valid) {
    ActRequest request = Request("c", 1);
    for (int i = 0; i < 3; ++i) request.mutable_slots(0)->add_valid_actions(i == valid);
    ASSERT_OK_AND_ASSIGN(const ActResponse response, Act(request));
    ASSERT_EQ(response.results(0).action_size(), 3);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(response.results(0).action(i), i == valid ? 1 : 0);
  }
  ActRequest request = Request("c", 1);
  AddSlot(request, 2);
  for (int i = 0; i < 3; ++i) request.mutable_slots(1)->add_valid_actions(false);
  ExpectRefused(request, absl::StatusCode::kInvalidArgument, "slots[1].valid_actions allows no action");
}

TEST_F(PlannerServiceTest, ABeliefOfAnotherStructureAsksForANewOne) {
  Start();
  ASSERT_OK_AND_ASSIGN(const ActResponse first, Act(Request("c", 1)));
  ASSERT_OK(planner_->snapshots().Load(TinySnapshot(2, 2)));
  ASSERT_OK_AND_ASSIGN(const ActResponse second, Act(Request("c", 2, &first.results(0))));
  EXPECT_EQ(second.snapshot_version().counter(), 2);
  EXPECT_EQ(Metric("orrery_planner_belief_lag").histogram.sample_sum, 1);
  ASSERT_OK(planner_->snapshots().Load(TinySnapshot(3, 3, TinyModel(20))));
  ExpectRefused(Request("c", 3, &second.results(0)), absl::StatusCode::kFailedPrecondition,
                "slots[0]: belief of another model structure");
  EXPECT_OK(Act(Request("c", 3)));
}

TEST_F(PlannerServiceTest, SwapsUnderLoadFailNothing) {
  Start();
  std::atomic<bool> stop = false;
  std::atomic<int> answered = 0;
  std::vector<std::thread> threads;
  for (size_t c = 0; c < 4; ++c) {
    threads.emplace_back([&, c] {
      ActResponse last;
      int64_t version = 0;
      for (uint64_t round = 0; !stop; ++round) {
        const absl::StatusOr<ActResponse> response =
            Act(Request(absl::StrCat("client", c), round, last.results_size() > 0 ? &last.results(0) : nullptr));
        ASSERT_OK(response);
        EXPECT_GE(response->snapshot_version().counter(), version);
        version = response->snapshot_version().counter();
        last = *response;
        ++answered;
      }
    });
  }
  const std::string bad = TinySnapshot(1000).substr(0, 2000);
  for (int64_t version = 2; version <= 20; ++version) {
    ASSERT_OK(planner_->snapshots().Load(TinySnapshot(version, static_cast<uint64_t>(version))));
    EXPECT_FALSE(planner_->snapshots().Load(bad).ok());
    const int before = answered;
    while (answered < before + 4) std::this_thread::yield();
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  ASSERT_OK_AND_ASSIGN(const ActResponse response, Act(Request("c", 1)));
  EXPECT_EQ(response.snapshot_version().counter(), 20);
  EXPECT_EQ(Metric("orrery_planner_snapshots_refused_total").counter.value, 19);
}

TEST_F(PlannerServiceTest, AnEvaluationKeepsItsSnapshot) {
  Start(1);
  ASSERT_OK_AND_ASSIGN(const ActResponse first, Act(Request("one", 1)));
  ASSERT_OK(planner_->snapshots().Load(TinySnapshot(2, 2)));
  ActRequest pinned = Request("one", 2, &first.results(0));
  *pinned.mutable_snapshot_version() = first.snapshot_version();
  ASSERT_OK_AND_ASSIGN(const ActResponse old, Act(pinned));
  EXPECT_EQ(old.snapshot_version().counter(), 1);
  ASSERT_OK_AND_ASSIGN(const ActResponse now, Act(Request("one", 2, &first.results(0))));
  EXPECT_EQ(now.snapshot_version().counter(), 2);
  EXPECT_NE(old.results(0).action(0), now.results(0).action(0)) << "other parameters";
  pinned.mutable_snapshot_version()->set_counter(99);
  ASSERT_OK_AND_ASSIGN(const ActResponse gone, Act(pinned));
  EXPECT_EQ(gone.snapshot_version().counter(), 2);
  EXPECT_EQ(gone.results(0).action(0), now.results(0).action(0));
}

// Requests for two snapshots in one batch: each gets the answer it gets alone.
TEST_F(PlannerServiceTest, SnapshotsShareABatch) {
  options_.service.set_max_delay_micros(500000);
  Start(1);
  ASSERT_OK(planner_->snapshots().Load(TinySnapshot(2, 2)));
  std::vector<ActRequest> requests = {Request("a", 1), Request("b", 1)};
  requests[0].mutable_snapshot_version()->set_generation(1);
  requests[0].mutable_snapshot_version()->set_counter(1);
  std::vector<ActResponse> alone;
  for (const ActRequest& request : requests) {
    ASSERT_OK_AND_ASSIGN(alone.emplace_back(), Act(request));
  }
  const std::vector<ActResponse> together = ActTogether(requests);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(together[i].snapshot_version().counter(), static_cast<int64_t>(i) + 1);
    ASSERT_EQ(together[i].results_size(), 1);
    ExpectSame(together[i].results(0), alone[i].results(0));
  }
  EXPECT_NE(alone[0].results(0).action(0), alone[1].results(0).action(0));
}

TEST_F(PlannerServiceTest, CloseFailsWhatWaitsAndWhatComesLater) {
  options_.service.set_max_delay_micros(1000000);
  Start();
  ASSERT_OK(Act(Request("absent", 1)));  // from now on the planner waits for this client, too
  std::thread waiting([this] {
    EXPECT_THAT(Act(Request("waiting", 1)), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("shutting down")));
  });
  while (Metric("orrery_planner_queue_depth").gauge.value == 0) std::this_thread::yield();
  planner_->Close();
  waiting.join();
  ExpectRefused(Request("late", 1), absl::StatusCode::kUnavailable, "shutting down");
}

TEST_F(PlannerServiceTest, TellsOnceWhenEveryModelHasASnapshot) {
  int told = 0;
  options_.on_ready = [&told] { ++told; };
  options_.models = {"a", "b"};
  Start(/*snapshot=*/0);
  ASSERT_OK(planner_->snapshots(1).Load(TinySnapshot(1)));
  EXPECT_EQ(told, 0);
  ASSERT_OK(planner_->snapshots(0).Load(TinySnapshot(1)));
  EXPECT_EQ(told, 1);
  ASSERT_OK(planner_->snapshots(0).Load(TinySnapshot(2)));
  EXPECT_EQ(told, 1);
}

TEST_F(PlannerServiceTest, RollsBackAndResumesOnCommand) {
  Start(1);
  EXPECT_THAT(Rollback(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no snapshot before 1.1 is kept")));
  ASSERT_OK_AND_ASSIGN(const ActResponse old, Act(Request("c", 1)));
  ASSERT_OK(planner_->snapshots().Load(TinySnapshot(2, 2)));
  ASSERT_OK_AND_ASSIGN(const ActResponse bad, Act(Request("c", 1)));
  ASSERT_NE(bad.results(0).action(0), old.results(0).action(0));

  planner::v1::RollbackRequest request;
  request.mutable_expected_version()->set_generation(1);
  request.mutable_expected_version()->set_counter(2);
  ASSERT_OK_AND_ASSIGN(const planner::v1::RollbackResponse done, Rollback(request));
  EXPECT_EQ(done.left_version().counter(), 2);
  EXPECT_EQ(done.state().snapshot_version().counter(), 1);
  EXPECT_TRUE(done.state().held());
  EXPECT_THAT(Rollback(request), StatusIs(absl::StatusCode::kAborted, HasSubstr("snapshot 1.1 is served, expected 1.2")));

  // A belief of the newer parameters goes on with the older ones.
  ASSERT_OK_AND_ASSIGN(const ActResponse after, Act(Request("c", 1)));
  ExpectSame(after.results(0), old.results(0));
  ASSERT_OK_AND_ASSIGN(const ActResponse next, Act(Request("c", 2, &bad.results(0))));
  EXPECT_EQ(next.snapshot_version().counter(), 1);
  ASSERT_OK(planner_->snapshots().Load(TinySnapshot(3, 3)));
  ASSERT_OK_AND_ASSIGN(const ActResponse still, Act(Request("c", 1)));
  EXPECT_EQ(still.snapshot_version().counter(), 1);
  EXPECT_EQ(State().newest_version().counter(), 3);

  grpc::ClientContext context;
  planner::v1::ResumeResponse resumed;
  ASSERT_OK(FromGrpc(stub_->Resume(&context, {}, &resumed)));
  EXPECT_EQ(resumed.state().snapshot_version().counter(), 3);
  EXPECT_FALSE(resumed.state().held());
  ASSERT_OK_AND_ASSIGN(const ActResponse newest, Act(Request("c", 1)));
  EXPECT_EQ(newest.snapshot_version().counter(), 3);
}

TEST_F(PlannerServiceTest, ServesSeveralModelsByName) {
  StartTwo();
  ASSERT_OK_AND_ASSIGN(const ActResponse champion, Act(RequestTo("champion", 1)));
  ASSERT_OK_AND_ASSIGN(const ActResponse challenger, Act(RequestTo("challenger", 1)));
  EXPECT_EQ(champion.snapshot_version().counter(), 1);
  EXPECT_EQ(challenger.snapshot_version().counter(), 5);
  EXPECT_NE(champion.results(0).action(0), challenger.results(0).action(0)) << "other parameters";
  EXPECT_EQ(Metric("orrery_planner_requests_total", "OK", "champion").counter.value, 1);
  EXPECT_EQ(Metric("orrery_planner_requests_total", "OK", "challenger").counter.value, 1);
  EXPECT_EQ(Metric("orrery_planner_snapshot_version", "", "challenger").gauge.value, 5);

  ExpectRefused(RequestTo("tiny", 1), absl::StatusCode::kNotFound,
                "model \"tiny\" is not served here, expected \"champion\", \"challenger\"");
  ExpectRefused(RequestTo("", 1), absl::StatusCode::kInvalidArgument,
                "model is empty, and several are served: expected one of \"champion\", \"challenger\"");
  EXPECT_EQ(Metric("orrery_planner_requests_total", "NOT_FOUND", "").counter.value, 1);
  EXPECT_EQ(Metric("orrery_planner_requests_total", "INVALID_ARGUMENT", "").counter.value, 1);

  grpc::ClientContext context;
  planner::v1::GetModelRequest request;
  request.set_model("challenger");
  planner::v1::GetModelResponse described;
  ASSERT_OK(FromGrpc(stub_->GetModel(&context, request, &described)));
  EXPECT_EQ(described.model(), "challenger");
  EXPECT_EQ(described.snapshot_version().counter(), 5);
}

TEST_F(PlannerServiceTest, ABeliefBelongsToItsModel) {
  StartTwo();
  ASSERT_OK_AND_ASSIGN(const ActResponse champion, Act(RequestTo("champion", 1)));
  EXPECT_OK(Act(RequestTo("champion", 2, &champion.results(0))));
  // The structure is the same, and still the latent states mean other things.
  ExpectRefused(RequestTo("challenger", 2, &champion.results(0)), absl::StatusCode::kFailedPrecondition, "slots[0]: belief");
}

TEST_F(PlannerServiceTest, ARollbackConcernsOneModel) {
  StartTwo();
  for (size_t i : {0, 1}) ASSERT_OK(planner_->snapshots(i).Load(TinySnapshot(9, 3)));
  EXPECT_THAT(Rollback(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("model is empty")));
  planner::v1::RollbackRequest request;
  request.set_model("nobody");
  EXPECT_THAT(Rollback(request), StatusIs(absl::StatusCode::kNotFound, HasSubstr("model \"nobody\"")));
  request.set_model("challenger");
  ASSERT_OK(Rollback(request));
  EXPECT_EQ(State("challenger").snapshot_version().counter(), 5);
  EXPECT_EQ(State("champion").snapshot_version().counter(), 9);
  EXPECT_FALSE(State("champion").held());
}

TEST_F(PlannerServiceTest, AModelWithoutASnapshotHoldsUpNoOther) {
  options_.models = {"here", "not yet"};
  Start(/*snapshot=*/0);
  ASSERT_OK(planner_->snapshots(0).Load(TinySnapshot(1)));
  EXPECT_OK(Act(RequestTo("here", 1)));
  ExpectRefused(RequestTo("not yet", 1), absl::StatusCode::kUnavailable, "no snapshot yet");
  EXPECT_FALSE(State("not yet").has_snapshot_version());
  EXPECT_FALSE(State("not yet").has_newest_version());
}

// On a CPU requests that wait together are computed, and answered, one after another.
TEST_F(PlannerServiceTest, NobodyWaitsForTheRestOfTheBatchOnACpu) {
  options_.service.set_max_delay_micros(500000);
  Start();
  for (const char* client : {"a", "b"}) ASSERT_OK(Act(Request(client, 1)));
  const auto count = [this](const std::string& name) { return Metric(name).histogram.sample_count; };
  const uint64_t batches = count("orrery_planner_batch_size"), computed = count("orrery_planner_compute_seconds");
  ActTogether({Request("a", 2), Request("b", 2)});
  EXPECT_EQ(count("orrery_planner_batch_size"), batches + 1);
  EXPECT_EQ(count("orrery_planner_compute_seconds"), computed + 2);
}

// Requests for two models in one batch: each gets the answer it gets alone.
TEST_F(PlannerServiceTest, ModelsShareABatch) {
  options_.service.set_max_delay_micros(500000);
  StartTwo();
  std::vector<ActRequest> requests = {RequestTo("champion", 1), RequestTo("challenger", 1)};
  std::vector<ActResponse> alone;
  for (size_t i = 0; i < 2; ++i) {
    requests[i].set_client_id(absl::StrCat("client", i));
    ASSERT_OK_AND_ASSIGN(alone.emplace_back(), Act(requests[i]));
  }
  const std::vector<ActResponse> together = ActTogether(requests);
  for (size_t i = 0; i < 2; ++i) {
    ASSERT_EQ(together[i].results_size(), 1);
    ExpectSame(together[i].results(0), alone[i].results(0));
  }
  EXPECT_EQ(Metric("orrery_planner_batch_size").histogram.sample_sum, 4);
}

// What its caller gave up is dropped before it is computed.
TEST_F(PlannerServiceTest, ComputesNothingForACallerThatHasGone) {
  options_.clock = &clock_;  // it stands still: nothing is due
  options_.service.set_max_batch(4);
  options_.service.set_max_queue(4);
  Start();
  ASSERT_OK(Act(Request("absent", 1)));  // from now on the planner waits for this client, too
  const auto computed = [this] { return Metric("orrery_planner_compute_seconds").histogram.sample_count; };
  const uint64_t before = computed();
  ActRequest request = Request("gone", 1);
  for (uint64_t seed : {2, 3}) AddSlot(request, seed);
  grpc::ClientContext context;
  std::thread caller([&] {
    ActResponse response;
    EXPECT_EQ(stub_->Act(&context, request, &response).error_code(), grpc::StatusCode::CANCELLED);
  });
  while (Metric("orrery_planner_queue_depth").gauge.value == 0) std::this_thread::yield();
  context.TryCancel();
  caller.join();
  // The planner hears of it a little later; what comes then takes the place.
  ActRequest two = Request("two", 1);
  AddSlot(two, 2);
  while (Metric("orrery_planner_requests_total", "CANCELLED").counter.value == 0) {
    EXPECT_FALSE(Act(two, absl::Milliseconds(10)).ok());
  }
  EXPECT_EQ(computed(), before);
  planner_->Close();
}

// Both are alive when their batch begins; while the first is computed, the time of the second ends.
TEST_F(PlannerServiceTest, ComputesNothingThatHasDiedBehindOthersOfItsBatch) {
  options_.clock = &computing_clock_;
  options_.service.set_max_batch(2);
  Start();
  ASSERT_OK(Act(Request("absent", 1)));  // from now on the planner waits for this client, too
  const auto count = [this](const std::string& name) { return Metric(name).histogram.sample_count; };
  const uint64_t batches = count("orrery_planner_batch_size"), computed = count("orrery_planner_compute_seconds");
  std::thread first([this] { EXPECT_OK(Act(Request("first", 1), absl::Hours(100))); });
  while (Metric("orrery_planner_queue_depth").gauge.value == 0) std::this_thread::yield();
  const absl::Duration half_way = computing_clock_.Now() + absl::Minutes(30) - absl::Now();
  EXPECT_THAT(Act(Request("second", 1), half_way),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("dropped before it was computed, after 1h")));
  first.join();
  EXPECT_EQ(count("orrery_planner_batch_size"), batches + 1);
  EXPECT_EQ(count("orrery_planner_compute_seconds"), computed + 1);
  EXPECT_EQ(Metric("orrery_planner_requests_total", "DEADLINE_EXCEEDED").counter.value, 1);
}

TEST_F(PlannerServiceTest, RefusesWhatDoesNotFitIntoTheQueueUnlessItIsAnEvaluation) {
  options_.clock = &clock_;
  options_.service.set_max_batch(2);  // as many slots may wait unless max_queue says more
  Start();
  ASSERT_OK(Act(Request("absent", 1)));
  std::thread displaced([this] {
    EXPECT_THAT(Act(Request("waiting", 1)), StatusIs(absl::StatusCode::kResourceExhausted));
  });
  while (Metric("orrery_planner_queue_depth").gauge.value == 0) std::this_thread::yield();
  ActRequest two = Request("two", 1);
  AddSlot(two, 2);
  ExpectRefused(two, absl::StatusCode::kResourceExhausted, "1 slots wait and 2 came, expected at most 2 together");
  two.set_priority(planner::v1::EVALUATION);
  EXPECT_OK(Act(two));
  displaced.join();
}

TEST_F(PlannerServiceTest, CreateRefusesOptionsOutOfRange) {
  const auto refuse = [this](const std::string& message) {
    EXPECT_THAT(PlannerServer::Create(options_), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  options_.service.set_max_queue(3);
  refuse("planner_service.max_queue is 3, expected 16");
  options_.service.clear_max_queue();
  options_.service.set_max_batch(0);
  refuse("planner_service.max_batch is 0, expected 1 to 1024");
  options_.service.clear_max_batch();
  options_.models = {"a", "b", "a"};
  refuse("model \"a\" is named twice");
  options_.models = {""};
  refuse("has 0 characters, expected 1 to 128");
  options_.models.clear();
  options_.device = "abacus";
  refuse("device \"abacus\"");
}

}  // namespace
}  // namespace orrery
