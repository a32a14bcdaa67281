// `orrery bench` as a program, with tiny sizes: what it prints is there, finite, and agrees with what the services saw.
#include "tools/orrery/bench.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/client/replay_client.h"
#include "libs/telemetry/service_host.h"
#include "orrery/planner/v1/planner.grpc.pb.h"
#include "services/replay/replay_service_impl.h"
#include "tools/orrery/program_testing.h"

namespace orrery {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;
using Json = nlohmann::json;

struct Results : Outcome {
  std::vector<Json> objects;
};

// Runs `orrery bench ARGUMENTS --json`.
Results Bench(const std::string& arguments) {
  Results results{Orrery("bench " + arguments + " --json"), {}};
  for (const absl::string_view line : absl::StrSplit(results.output, '\n')) {
    if (absl::StartsWith(line, "{")) results.objects.push_back(Json::parse(line));
  }
  return results;
}

std::vector<std::string> Whats(const Results& outcome) {
  std::vector<std::string> whats;
  for (const Json& object : outcome.objects) whats.push_back(object["what"]);
  return whats;
}

// A number above 0.
void ExpectMeasured(const Json& object, const std::string& key) {
  ASSERT_TRUE(object.contains(key) && object[key].is_number()) << key << " in " << object;
  EXPECT_TRUE(std::isfinite(object[key].get<double>()) && object[key].get<double>() > 0) << key << " in " << object;
}

// Small pictures and batches of the built-in task.
constexpr char kConfig[] = R"(
  name: "load"
  environment { task: "point_pixels" image_size: 32 }
  collection { seed_episodes: 100000 }
  learning { schedule: CONCURRENT batch_size: 3 sequence_length: 5 }
  replay { chunk_rows: 50 limiter { tolerance: 1e9 } })";
constexpr char kTiny[] = " --warm_up=0 --repeats=2 --batches=2 --append_rows=100";

// A replay service of that configuration behind a port.
class ReplayService {
 public:
  ReplayService() {
    EXPECT_OK(WriteFileAtomically(config(), kConfig));
    store_ = OpenStore({.location = "memory:", .run = "load"}).value();
    const auto registry = std::make_shared<prometheus::Registry>();
    server_ = ReplayServer::Create({LoadExperiment(config()).value(), store_.get(), registry}).value();
    HostOptions options;
    options.name = "replay";
    options.listen = "127.0.0.1:0";
    options.registry = registry;
    options.services = {server_->service()};
    host_ = ServiceHost::Start(std::move(options)).value();
    server_->Start([](bool) {});
  }
  ~ReplayService() {
    server_->Shutdown();
    host_->Shutdown(absl::ZeroDuration());
  }
  std::string config() const { return dir_ / "config.textproto"; }
  std::string flags() const { return absl::StrCat(" --replay=127.0.0.1:", host_->port(), " --config=", config()); }
  int64_t rows() {
    ReplayClient client(host_->InProcessChannel(), "load");
    return client.GetStats(absl::Now() + absl::Seconds(60)).value().rows();
  }

 private:
  const TempDir dir_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<ReplayServer> server_;
  std::unique_ptr<ServiceHost> host_;
};

// Answers at once, or after a while, and checks that each client sends back the belief and action it was given.
class FakePlanner : public planner::v1::PlannerService::Service {
 public:
  explicit FakePlanner(int refuse_every = 0, absl::Duration delay = absl::ZeroDuration())
      : refuse_every_(refuse_every), delay_(delay) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakePlanner() override { server_->Shutdown(); }

  grpc::Status GetModel(grpc::ServerContext*, const planner::v1::GetModelRequest*,
                        planner::v1::GetModelResponse* response) override {
    response->set_model("fake");
    response->set_model_config(
        "action { continuous { size: 2 } } modalities { name: 'image' image { height: 32 width: 32 channels: 3 } } "
        "modalities { name: 'joints' vector { size: 3 } }");
    return grpc::Status::OK;
  }

  grpc::Status Act(grpc::ServerContext*, const planner::v1::ActRequest* request,
                   planner::v1::ActResponse* response) override {
    absl::SleepFor(delay_);
    absl::MutexLock lock(&mu_);
    const planner::v1::Slot& slot = request->slots(0);
    std::string& belief = beliefs_[request->client_id()];
    const bool right = request->slots_size() == 1 && slot.belief() == belief && slot.observations_size() == 2 &&
                       slot.observations(0).tensor().data().size() == 32 * 32 * 3 &&
                       slot.observations(1).tensor().data().size() == 12 &&
                       slot.previous_action_size() == (belief.empty() ? 0 : 2);
    if (!right) return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, slot.ShortDebugString());
    ++answered_;
    if (refuse_every_ > 0 && answered_ % refuse_every_ == 0) {
      return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "the queue is full");
    }
    belief = absl::StrCat(request->client_id(), " ", answered_);
    response->add_results()->set_belief(belief);
    response->mutable_results(0)->add_action(0.5f);
    response->mutable_results(0)->add_action(-0.5f);
    return grpc::Status::OK;
  }

  std::string flag() const { return absl::StrCat(" --planner=127.0.0.1:", port_); }
  int64_t answered() const {
    absl::MutexLock lock(&mu_);
    return answered_;
  }
  size_t clients() const {
    absl::MutexLock lock(&mu_);
    return beliefs_.size();
  }

 private:
  const int refuse_every_;
  const absl::Duration delay_;
  int port_ = 0;
  mutable absl::Mutex mu_;
  int64_t answered_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<std::string, std::string> beliefs_ ABSL_GUARDED_BY(mu_);  // by client
  std::unique_ptr<grpc::Server> server_;
};

TEST(Quantile, IsTheSmallestValueThatTheShareDoesNotExceed) {
  EXPECT_EQ(Quantile({4, 1, 3, 2}, 0.5), 2);
  EXPECT_EQ(Quantile({4, 1, 3, 2}, 0.51), 3);
  EXPECT_EQ(Quantile({4, 1, 3, 2}, 0.99), 4);
  EXPECT_EQ(Quantile({7}, 0.01), 7);
  std::vector<double> hundred;
  for (int i = 100; i > 0; --i) hundred.push_back(i);
  EXPECT_EQ(Quantile(hundred, 0.99), 99);
  EXPECT_EQ(Quantile(hundred, 1), 100);
}

TEST(BenchEnv, MeasuresPicturesAndStepsOnOneAndOnSeveralThreads) {
  const Results outcome = Bench("env --task=point_pixels --size=32 --threads=2 --steps=100 --frames=3 --warm_up=0 --repeats=1");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  ASSERT_THAT(Whats(outcome), ElementsAre("render", "step", "step"));
  ExpectMeasured(outcome.objects[0], "frames_per_second");
  EXPECT_EQ(outcome.objects[0]["quality"], "fast");
  EXPECT_EQ(outcome.objects[0]["size"], 32);
  for (int threads : {1, 2}) {
    const Json& steps = outcome.objects[static_cast<size_t>(threads)];
    ExpectMeasured(steps, "steps_per_second");
    EXPECT_EQ(steps["threads"], threads);
    EXPECT_EQ(steps["task"], "point_pixels");
  }
  EXPECT_THAT(Bench("env --task=point_pixels,nope --steps=1 --frames=1").output, HasSubstr("unknown task \"nope\""));
}

TEST(BenchReplay, MeasuresAServiceOfItsOwnAndLeavesNothingBehind) {
  const TempDir dir;
  const Results outcome = Bench(absl::StrCat("replay --store=file:", dir / "store", kTiny,
                                             " --set environment.task=point_pixels --set environment.image_size=32",
                                             " --set learning.batch_size=3 --set learning.sequence_length=5"));
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  ASSERT_THAT(Whats(outcome), ElementsAre("append", "append_encoded", "sample_mirrored", "preprocess",
                                           "sample_remote", "sample_remote_decoded"));
  for (const Json& object : outcome.objects) {
    EXPECT_EQ(object["server"], "this process");
    EXPECT_EQ(object["store"], "file");
    if (object.contains("batch")) {
      ExpectMeasured(object, "batches_per_second");
      EXPECT_EQ(object["batch"], 3);
      EXPECT_EQ(object["length"], 5);
      EXPECT_EQ(object["rows"], 4 * 500) << "two calls of one episode, twice";
    } else {
      ExpectMeasured(object, "rows_per_second");
      EXPECT_EQ(object["chunk_rows"], 50);
    }
  }
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir.path())) {
    EXPECT_FALSE(entry.is_regular_file()) << entry.path();
  }
}

TEST(BenchReplay, MeasuresARunningService) {
  ReplayService service;
  const Results outcome = Bench(absl::StrCat("replay", service.flags(), kTiny));
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(Whats(outcome), ElementsAre("append", "append_encoded", "sample_mirrored", "preprocess",
                                           "sample_remote", "sample_remote_decoded"));
  EXPECT_EQ(service.rows(), 4 * 500);
}

TEST(BenchReplay, MeasuresOnlyWhatIsAskedFor) {
  ReplayService service;
  const Results outcome = Bench(absl::StrCat("replay --only=sample_remote --decode_threads=3", service.flags(), kTiny));
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(Whats(outcome), ElementsAre("sample_remote"));
  EXPECT_EQ(service.rows(), 500) << "only what there must be to sample from";
  EXPECT_THAT(Bench(absl::StrCat("replay --only=nothing", service.flags(), kTiny)).output, HasSubstr("nothing"));
}

TEST(BenchReplay, ShowsWhatSamplingCostsBySizeOfTheDataSet) {
  const Results outcome = Bench("replay --rows=1000,20000 --warm_up=0 --repeats=1 --batches=2");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  ASSERT_THAT(Whats(outcome), ElementsAre("sample_scaling", "sample_scaling"));
  EXPECT_EQ(outcome.objects[0]["rows"], 1000);
  EXPECT_EQ(outcome.objects[1]["rows"], 20000);
  for (const Json& object : outcome.objects) {
    ExpectMeasured(object, "batches_per_second");
    ExpectMeasured(object, "draw_batch_micros");
    ExpectMeasured(object, "draw_prioritized_batch_micros");
    // state [4] and action [1] as float32, a reward, two flags.
    EXPECT_EQ(object["row_bytes"], 16 + 4 + 4 + 1 + 1);
    if (object["index_bytes_per_row"].is_null()) continue;  // a sanitizer's allocator does not count
    // A chunk of 50 rows has at least its description in the index, and not much more.
    EXPECT_GT(object["index_bytes_per_row"], 1);
    EXPECT_LT(object["index_bytes_per_row"], 100);
    // 32 bytes a chunk, and up to 32 in the sums for one exponent, in vectors that have room for up to twice as much.
    EXPECT_GE(object["priority_bytes_per_row"], 48 / 50.0);
    EXPECT_LE(object["priority_bytes_per_row"], 96 / 50.0 + 0.1);
  }
}

TEST(BenchReplay, RefusesFlagsThatContradictEachOther) {
  EXPECT_THAT(Bench("replay --rows=100 --store=memory:").output, HasSubstr("--rows measures synthetic rows"));
  EXPECT_THAT(Bench("replay --store=memory: --replay=127.0.0.1:1").output, HasSubstr("give one of them"));
  EXPECT_THAT(Bench("replay --replay=127.0.0.1:1").output, HasSubstr("--replay needs --config"));
  EXPECT_EQ(Bench("replay --rows=0").code, 2);
}

TEST(BenchLoad, AThousandActorsKeepTheirBeliefsApart) {
  const FakePlanner planner;
  const Results outcome = Bench("load --actors=1000 --seconds=2 --warm_up=0.2 --timeout=60" + planner.flag());
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  ASSERT_THAT(outcome.objects, SizeIs(1)) << outcome.output;
  const Json& load = outcome.objects[0];
  EXPECT_EQ(load["what"], "load");
  EXPECT_EQ(load["target"], "planner");
  EXPECT_EQ(load["loop"], "closed");
  EXPECT_EQ(load["actors"], 1000);
  for (const char* key : {"served_per_second", "p50_seconds", "p99_seconds"}) ExpectMeasured(load, key);
  EXPECT_LE(load["p50_seconds"], load["p99_seconds"]);
  EXPECT_EQ(load["refused_per_second"], 0);
  EXPECT_EQ(load["errors"].size(), 0u) << load;
  EXPECT_EQ(planner.clients(), 1000u);
  EXPECT_LE(load["served_per_second"].get<double>() * 2, static_cast<double>(planner.answered()));
}

TEST(BenchLoad, CountsRefusedRequestsApart) {
  const FakePlanner planner(/*refuse_every=*/2);
  const Results outcome = Bench("load --actors=4 --seconds=2 --warm_up=0" + planner.flag());
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  ASSERT_THAT(outcome.objects, SizeIs(1)) << outcome.output;
  ExpectMeasured(outcome.objects[0], "served_per_second");
  ExpectMeasured(outcome.objects[0], "refused_per_second");
  EXPECT_EQ(outcome.objects[0]["errors"].size(), 0u) << outcome.objects[0];
}

TEST(BenchLoad, LatenciesOfAnOpenLoopCountFromWhenTheRequestWasDue) {
  const FakePlanner planner(/*refuse_every=*/0, absl::Milliseconds(50));
  // One actor that is due 100 times a second and served 20 times at most.
  const Results outcome = Bench("load --actors=1 --rate=100 --seconds=1 --warm_up=0" + planner.flag());
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  ASSERT_THAT(outcome.objects, SizeIs(1)) << outcome.output;
  const Json& load = outcome.objects[0];
  EXPECT_EQ(load["loop"], "open");
  EXPECT_LE(planner.answered(), 21);
  EXPECT_GE(load["p99_seconds"].get<double>(), 0.05);
  EXPECT_GE(load["unsent"].get<int64_t>() + planner.answered(), 99) << "100 were due: each was sent or not";
  EXPECT_LE(load["unsent"].get<int64_t>() + planner.answered(), 101);
  if (planner.answered() >= 10) {
    EXPECT_GE(load["p99_seconds"].get<double>(), 0.4) << "the tenth was due after 0.09 s and answered after 0.5 s";
  }
}

TEST(BenchLoad, EveryAcknowledgedRowIsStored) {
  ReplayService service;
  // 200,000 rows at most: from a million on the oldest are dropped.
  const Results outcome = Bench("load --actors=20 --rate=2000 --seconds=2 --warm_up=0 --timeout=60" + service.flags());
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  ASSERT_THAT(outcome.objects, SizeIs(1)) << outcome.output;
  const Json& load = outcome.objects[0];
  EXPECT_EQ(load["target"], "replay");
  for (const char* key : {"served_per_second", "rows_per_second", "p50_seconds", "p99_seconds"}) ExpectMeasured(load, key);
  EXPECT_NEAR(load["rows_per_second"].get<double>(), 50 * load["served_per_second"].get<double>(), 1e-6);
  EXPECT_EQ(load["errors"].size(), 0u) << load;
  EXPECT_GE(static_cast<double>(service.rows()), std::floor(load["rows_per_second"].get<double>() * 2 - 1e-6));
  EXPECT_EQ(service.rows() % 50, 0);
}

TEST(BenchLoad, SaysWhatIsWrong) {
  EXPECT_THAT(Bench("load").output, HasSubstr("give either --planner=HOST:PORT or --replay=HOST:PORT"));
  EXPECT_THAT(Bench("load --planner=127.0.0.1:1 --set name=x").output, HasSubstr("--config and --set go with --replay"));
  EXPECT_THAT(Bench("load --replay=127.0.0.1:1").output, HasSubstr("--replay needs --config"));
  EXPECT_THAT(Bench("load --replay=127.0.0.1:1 --model=a").output, HasSubstr("--model goes with --planner"));
  const Results away = Bench("load --planner=127.0.0.1:1 --timeout=0.5");
  EXPECT_EQ(away.code, 1);
  EXPECT_THAT(away.output, HasSubstr("orrery: error: "));
  const TempDir dir;
  ASSERT_OK(WriteFileAtomically(dir / "config.textproto", kConfig));
  const Results nothing =
      Bench(absl::StrCat("load --replay=127.0.0.1:1 --actors=2 --seconds=0.2 --warm_up=0 --config=", dir / "config.textproto"));
  EXPECT_EQ(nothing.code, 1);
  EXPECT_THAT(nothing.output, HasSubstr("nothing was served"));
}

}  // namespace
}  // namespace orrery
