// The programs orrery-planner, with several models, and `orrery planner`.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <torch/torch.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/replay/testing/child_process.h"
#include "libs/serving/testing.h"
#include "libs/telemetry/service_host.h"
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
