// The programs orrery-planner, with several models, and `orrery planner`.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/client/channel.h"
#include "libs/replay/testing/child_process.h"
#include "libs/serving/testing.h"
#include "libs/telemetry/service_host.h"
#include "libs/tensors/tensors.h"
#include "orrery/planner/v1/planner.grpc.pb.h"
#include "services/planner/planner_service_impl.h"
#include "tests/process.h"
#include "tools/orrery/program_testing.h"

namespace orrery {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

std::vector<nlohmann::json> Lines(const Outcome& outcome) {
  EXPECT_EQ(outcome.code, 0) << outcome.output;
  std::vector<nlohmann::json> lines;
  for (absl::string_view line : absl::StrSplit(outcome.output, '\n', absl::SkipEmpty())) {
    lines.push_back(nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false));
    EXPECT_FALSE(lines.back().is_discarded()) << line;
  }
  return lines;
}

nlohmann::json Version(int64_t counter) { return {{"generation", 1}, {"counter", counter}}; }

// A planner in this process, at a real port.
class PlannerCommandTest : public ::testing::Test {
 protected:
  void SetUp() override {
    torch::set_num_threads(1);
    PlannerServer::Options options;
    options.registry = std::make_shared<prometheus::Registry>();
    options.models = {"a", "b"};
    HostOptions host;
    host.name = "planner";
    host.listen = "127.0.0.1:0";
    host.registry = options.registry;
    ASSERT_OK_AND_ASSIGN(planner_, PlannerServer::Create(std::move(options)));
    host.services = {planner_->service()};
    ASSERT_OK_AND_ASSIGN(host_, ServiceHost::Start(std::move(host)));
    for (int64_t counter : {1, 2}) ASSERT_OK(planner_->snapshots(0).Load(TinySnapshot(counter)));
  }
  void TearDown() override {
    host_->Shutdown(absl::Seconds(1));
    planner_->Close();
  }
  Outcome Command(const std::string& arguments) const {
    return Orrery(absl::StrCat("planner ", arguments, " --planner=127.0.0.1:", host_->port()));
  }

  std::unique_ptr<PlannerServer> planner_;
  std::unique_ptr<ServiceHost> host_;
};

TEST_F(PlannerCommandTest, RollsBackAndResumes) {
  const auto rolled = Lines(Command("rollback --json --model=a"));
  ASSERT_THAT(rolled, SizeIs(1));
  EXPECT_EQ(rolled[0]["planner"], absl::StrCat("127.0.0.1:", host_->port()));
  EXPECT_EQ(rolled[0]["model"], "a");
  EXPECT_EQ(rolled[0]["served"], Version(1));
  EXPECT_EQ(rolled[0]["newest"], Version(2));
  EXPECT_EQ(rolled[0]["previous"], nullptr);
  EXPECT_EQ(rolled[0]["held"], true);
  EXPECT_EQ(planner_->snapshots(0).version().counter, 1);

  const Outcome again = Command("rollback --model=a");
  EXPECT_EQ(again.code, 1);
  EXPECT_THAT(again.output, HasSubstr("no snapshot before 1.1 is kept"));

  const auto listed = Lines(Command("list --json"));
  ASSERT_THAT(listed, SizeIs(2));
  EXPECT_EQ(listed[0], rolled[0]);
  EXPECT_EQ(listed[1]["model"], "b");
  EXPECT_EQ(listed[1]["served"], nullptr);
  EXPECT_EQ(listed[1]["held"], false);

  const Outcome resumed = Command("resume --model=a");
  EXPECT_EQ(resumed.code, 0);
  EXPECT_THAT(resumed.output, HasSubstr("model \"a\": serves 1.2, newest 1.2, the one before 1.1"));
  EXPECT_EQ(planner_->snapshots(0).version().counter, 2);
}

TEST_F(PlannerCommandTest, NamesWhatIsWrong) {
  const Outcome unnamed = Command("rollback");
  EXPECT_EQ(unnamed.code, 1);
  EXPECT_THAT(unnamed.output, HasSubstr("several models are served: give --model, one of \"a\", \"b\""));
  const Outcome unknown = Command("rollback --model=c");
  EXPECT_EQ(unknown.code, 1);
  EXPECT_THAT(unknown.output, HasSubstr("--model=c is not served, expected one of \"a\", \"b\""));
  // A planner that is not there, and one that is: both are asked.
  const Outcome half = Command("rollback --model=a --timeout=0.5 --planner=127.0.0.1:1");
  EXPECT_EQ(half.code, 1);
  EXPECT_THAT(half.output, HasSubstr("--planner=127.0.0.1:1: "));
  EXPECT_EQ(planner_->snapshots(0).version().counter, 1);
  EXPECT_EQ(Orrery("planner rollback").code, 2);
}

TEST(PlannerProgram, ServesSeveralModelsFromFiles) {
  const TempDir dir;
  ASSERT_OK(WriteFileAtomically(dir / "a.safetensors", TinySnapshot(1, 1)));
  ASSERT_OK(WriteFileAtomically(dir / "b.safetensors", TinySnapshot(2, 2, TinyModel(20))));
  const int port = FreePort().value(), metrics = FreePort().value();
  Process planner({absl::StrCat(ORRERY_BIN_DIR, "/orrery-planner"), absl::StrCat("--model=first=file:", dir / "a.safetensors"),
                   absl::StrCat("--model=second=file:", dir / "b.safetensors"), "--threads=1",
                   absl::StrCat("--listen=127.0.0.1:", port), "--health_listen=127.0.0.1:0",
                   absl::StrCat("--metrics_listen=127.0.0.1:", metrics), "--max_connection_age=1"},
                  dir / "planner.log");
  const auto models = Lines(Orrery(absl::StrCat("planner list --json --timeout=60 --planner=127.0.0.1:", port)));
  ASSERT_THAT(models, SizeIs(2)) << planner.Log();
  EXPECT_EQ(models[0]["model"], "first");
  EXPECT_EQ(models[1]["model"], "second");
  const absl::Time deadline = absl::Now() + absl::Seconds(60);
  while (MetricValue(HttpGet(metrics, "/metrics"), "orrery_planner_snapshot_version{model=\"second\"}") != 2) {
    ASSERT_LT(absl::Now(), deadline) << planner.Log();
    absl::SleepFor(absl::Milliseconds(20));
  }
  EXPECT_EQ(MetricValue(HttpGet(metrics, "/metrics"), "orrery_planner_snapshot_version{model=\"first\"}"), 1);

  const std::string flag = absl::StrCat(" --planner=127.0.0.1:", port);
  const auto answered = [metrics](const std::string& model) {
    return MetricValue(HttpGet(metrics, "/metrics"),
                       absl::StrCat("orrery_planner_requests_total{code=\"OK\",model=\"", model, "\"}"));
  };
  const auto load = Lines(Orrery("bench load --model=second --actors=2 --seconds=0.2 --warm_up=0 --json" + flag));
  ASSERT_THAT(load, SizeIs(1));
  EXPECT_GT(load[0]["served_per_second"], 0);
  const double loaded = answered("second");
  EXPECT_GT(loaded, 0);
  EXPECT_EQ(answered("first"), 0);
  EXPECT_THAT(Orrery("bench load --seconds=0.2 --warm_up=0" + flag).output,
              HasSubstr("several are served: expected one of \"first\", \"second\""));
  const auto evaluated = Lines(Orrery("eval --env=point_pixels --model=first --json" + flag));
  ASSERT_THAT(evaluated, SizeIs(1));
  EXPECT_EQ(evaluated[0]["model"], "first");
  EXPECT_EQ(evaluated[0]["snapshot"], Version(1));
  EXPECT_EQ(answered("first"), evaluated[0]["rows"][0].get<int>() - 1) << "one answer a decision";
  EXPECT_EQ(answered("second"), loaded);
  EXPECT_THAT(Orrery("eval --env=point_pixels --model=third" + flag).output, HasSubstr("model \"third\" is not served here"));
  planner.Signal(SIGTERM);
  EXPECT_EQ(planner.Wait(absl::Seconds(60)), 0) << planner.Log();
}

// Agents that ask one after the other, without the retries of PlannerClient.
class Crowd {
 public:
  Crowd(std::shared_ptr<grpc::Channel> channel, int agents)
      : stub_(planner::v1::PlannerService::NewStub(std::move(channel))) {
    for (int i = 0; i < agents; ++i) threads_.emplace_back([this, i] { Run(i); });
  }
  ~Crowd() { Finish(); }
  // The number of answers by their code.
  std::map<grpc::StatusCode, int> answers() const {
    absl::MutexLock lock(&mu_);
    return answers_;
  }
  std::map<grpc::StatusCode, int> Finish() {
    finished_ = true;
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    return answers();
  }
  grpc::Status Ask(int agent) {
    planner::v1::ActRequest request;
    request.set_client_id(absl::StrCat("agent-", agent));
    planner::v1::Slot& slot = *request.add_slots();
    for (const auto& [name, array] : TinyObservation(static_cast<uint64_t>(agent))) {
      common::v1::NamedTensor& observation = *slot.add_observations();
      observation.set_name(name);
      *observation.mutable_tensor() = ToProto(array);
    }
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(120)));
    planner::v1::ActResponse response;
    const grpc::Status status = stub_->Act(&context, request, &response);
    EXPECT_EQ(response.results_size(), status.ok() ? 1 : 0);
    absl::MutexLock lock(&mu_);
    ++answers_[status.error_code()];
    return status;
  }

 private:
  void Run(int agent) {
    while (!finished_) {
      const grpc::Status status = Ask(agent);
      if (status.ok()) continue;
      EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
      absl::SleepFor(absl::Milliseconds(1));
    }
  }

  const std::unique_ptr<planner::v1::PlannerService::Stub> stub_;
  mutable absl::Mutex mu_;
  std::map<grpc::StatusCode, int> answers_ ABSL_GUARDED_BY(mu_);
  std::atomic<bool> finished_ = false;
  std::vector<std::thread> threads_;
};

// Sixteen agents, of which batch and queue hold six.
TEST(PlannerProgram, RefusesWhatDoesNotFitAndServesTheRest) {
  constexpr int kMaxQueue = 4;
  const TempDir dir;
  config::v1::Planner plan = TinyPlanner();
  plan.mutable_cem()->set_candidates(1000);
  ASSERT_OK(WriteFileAtomically(dir / "snapshot.safetensors", TinySnapshot(1, 1, TinyModel(), plan)));
  ASSERT_OK(WriteFileAtomically(dir / "config.textproto",
                                absl::StrCat("name: \"overload\" environment { task: \"point_pixels\" image_size: 32 } "
                                             "learning { schedule: ALTERNATE } "
                                             "planner_service { max_batch: 2 max_queue: ", kMaxQueue, " }")));
  const int port = FreePort().value(), metrics = FreePort().value();
  Process planner({absl::StrCat(ORRERY_BIN_DIR, "/orrery-planner"), absl::StrCat("--config=", dir / "config.textproto"),
                   absl::StrCat("--model=tiny=file:", dir / "snapshot.safetensors"), "--threads=1",
                   absl::StrCat("--listen=127.0.0.1:", port), "--health_listen=127.0.0.1:0",
                   absl::StrCat("--metrics_listen=127.0.0.1:", metrics)},
                  dir / "planner.log");
  const auto metric = [metrics](const std::string& name) { return MetricValue(HttpGet(metrics, "/metrics"), name); };
  const absl::Time deadline = absl::Now() + absl::Seconds(200);
  while (metric("orrery_planner_snapshot_version{model=\"tiny\"}") != 1) {
    ASSERT_LT(absl::Now(), deadline) << planner.Log();
    absl::SleepFor(absl::Milliseconds(20));
  }

  ASSERT_OK_AND_ASSIGN(const auto channel, MakeChannel(absl::StrCat("127.0.0.1:", port)));
  Crowd crowd(channel, 16);
  double deepest = 0;
  for (int samples = 0; samples < 100 || deepest == 0 || crowd.answers()[grpc::StatusCode::OK] < 100 ||
                        crowd.answers()[grpc::StatusCode::RESOURCE_EXHAUSTED] < 100;) {
    ASSERT_LT(absl::Now(), deadline) << "deepest queue " << deepest << "\n" << planner.Log();
    const double depth = metric("orrery_planner_queue_depth");
    ASSERT_LE(depth, kMaxQueue);
    if (depth >= 0) ++samples;
    deepest = std::max(deepest, depth);
  }
  std::map<grpc::StatusCode, int> answers = crowd.Finish();
  EXPECT_THAT(answers, SizeIs(2)) << "OK and RESOURCE_EXHAUSTED, nothing else";
  EXPECT_TRUE(planner.Running()) << planner.Log();
  EXPECT_EQ(metric("orrery_planner_queue_depth"), 0);
  EXPECT_EQ(metric("orrery_planner_requests_total{code=\"OK\",model=\"tiny\"}"), answers[grpc::StatusCode::OK]);
  EXPECT_EQ(metric("orrery_planner_requests_total{code=\"RESOURCE_EXHAUSTED\",model=\"tiny\"}"),
            answers[grpc::StatusCode::RESOURCE_EXHAUSTED]);
  for (int i = 0; i < 3; ++i) {
    const grpc::Status status = crowd.Ask(i);
    EXPECT_TRUE(status.ok()) << status.error_message();
  }
  planner.Signal(SIGTERM);
  EXPECT_EQ(planner.Wait(absl::Seconds(60)), 0) << planner.Log();
}

TEST(PlannerProgram, RefusesSourcesThatDoNotGoTogether) {
  const TempDir dir;
  const auto refuse = [&dir](std::vector<std::string> flags, const std::string& message) {
    std::vector<std::string> argv = {absl::StrCat(ORRERY_BIN_DIR, "/orrery-planner"), "--listen=127.0.0.1:0",
                                     "--health_listen=127.0.0.1:0", "--metrics_listen=127.0.0.1:0"};
    argv.insert(argv.end(), flags.begin(), flags.end());
    Process planner(std::move(argv), dir / absl::StrCat(message.size(), ".log"));
    EXPECT_EQ(planner.Wait(absl::Seconds(60)), 1) << planner.Log();
    EXPECT_THAT(planner.Log(), HasSubstr(message));
  };
  refuse({}, "nothing to serve: give --learner, --replay, --snapshot or --model");
  refuse({"--model=a=file:f", "--snapshot=g"}, "leave out --learner, --replay, --snapshot and --run");
  refuse({"--model=a=elsewhere"}, "--model=a=elsewhere: \"elsewhere\" is no kind of source");
  refuse({"--model=a=learner:127.0.0.1:1", "--model=a=learner:127.0.0.1:2"}, "model \"a\" is named twice");
}

}  // namespace
}  // namespace orrery
