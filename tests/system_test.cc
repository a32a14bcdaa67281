// The whole system as separate processes over a real Redis: it learns, and every service may be killed at any time.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/file.h"
#include "libs/base/status.h"
#include "libs/base/status_matchers.h"
#include "libs/base/testing.h"
#include "libs/client/channel.h"
#include "libs/client/planner_client.h"
#include "libs/client/replay_client.h"
#include "libs/envs/environment.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/testing/redis_server.h"
#include "orrery/config/v1/experiment.pb.h"
#include "tests/process.h"

namespace orrery {
namespace {

constexpr char kConfig[] = R"pb(
  name: "system_test"
  environment { task: "point_pixels" image_size: 32 }
  model {
    deterministic_size: 32 stochastic_size: 8 hidden_size: 32 activation: ELU
    modalities { name: "image" image { height: 32 width: 32 depth: 4 } }
    reward { layers: 1 hidden_size: 32 }
    objective { free_nats: 1 }
  }
  planner { cem { horizon: 6 iterations: 3 candidates: 64 elites: 8 } }
  collection { seed_episodes: 4 environments: 1 lease_seconds: 5 }
  evaluation { every_episodes: 10 }
  learning {
    schedule: CONCURRENT batch_size: 8 sequence_length: 10 learning_rate: 0.002
    snapshot_every_updates: 20 checkpoint_every_updates: 20
  }
  replay { chunk_rows: 10 limiter { updates_per_row: 0.2 tolerance: 50 absent_seconds: 20 } }
)pb";

// Waits until `condition` holds; false after `timeout`.
bool Eventually(absl::Duration timeout, const std::function<bool()>& condition) {
  const absl::Time deadline = absl::Now() + timeout;
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(100));
  }
  return true;
}

// Watches the data set through the replay service and remembers every chunk it ever showed.
class Witness {
 public:
  Witness(std::shared_ptr<grpc::Channel> channel, const std::string& run)
      : watcher_(ChunkWatcher::Create(std::move(channel), run, /*include_evaluation=*/true)),
        thread_([this] { Run(); }) {}
  ~Witness() {
    watcher_->Close();
    thread_.join();
  }
  std::map<ChunkKey, std::string> chunks() {
    absl::MutexLock lock(&mu_);
    return chunks_;
  }

 private:
  void Run() {
    while (true) {
      auto event = watcher_->Next(absl::Now() + absl::Seconds(1));
      if (absl::IsCancelled(event.status())) return;
      if (!event.ok() || !event->appended) continue;
      absl::MutexLock lock(&mu_);
      chunks_[event->appended->info.key] = event->appended->payload;
    }
  }

  absl::Mutex mu_;
  std::map<ChunkKey, std::string> chunks_ ABSL_GUARDED_BY(mu_);
  const std::unique_ptr<ChunkWatcher> watcher_;
  std::thread thread_;
};

// Rows as an actor would send them.
Chunk ProbeChunk(const ReplayClient::Episode& episode, uint64_t specification_hash, int64_t first_row, int64_t rows = 10) {
  ArrayMap fields;
  fields["image"] = Array::Zeros(DType::kUInt8, {rows, 32, 32, 3});
  fields["image"].bytes[5] = static_cast<char>(first_row);
  fields[kAction] = Array::Zeros(DType::kFloat32, {rows, 2});
  fields[kReward] = Array::Zeros(DType::kFloat32, {rows});
  fields[kIsFirst] = Array::Zeros(DType::kUInt8, {rows});
  fields[kIsFirst].bytes[0] = first_row == 0;
  fields[kIsTerminal] = Array::Zeros(DType::kUInt8, {rows});
  Chunk chunk{episode.assignment.run_id, {}, EncodeRows(fields).value()};
  chunk.info.key = {episode.assignment.episode_id, first_row};
  chunk.info.rows = rows;
  chunk.info.mode = episode.assignment.mode;
  chunk.info.specification_hash = specification_hash;
  chunk.info.payload_bytes = static_cast<int64_t>(chunk.payload.size());
  return chunk;
}

// Appends chunks of one row, one after the other, and remembers those that it was told are stored.
class ProbeWriter {
 public:
  ProbeWriter(std::shared_ptr<grpc::Channel> channel, ReplayClient::Episode episode, uint64_t specification_hash)
      : writer_(ReplayWriter::Create(std::move(channel), "system_test", {})),
        thread_([this, episode = std::move(episode), specification_hash] { Run(episode, specification_hash); }) {}
  ~ProbeWriter() { Finish().IgnoreError(); }
  size_t acknowledged() const {
    absl::MutexLock lock(&mu_);
    return acknowledged_.size();
  }
  // All that was acknowledged, or what ended the writing.
  absl::StatusOr<std::map<ChunkKey, std::string>> Finish() {
    finished_ = true;
    if (thread_.joinable()) thread_.join();
    RETURN_IF_ERROR(status_);
    absl::MutexLock lock(&mu_);
    return acknowledged_;
  }

 private:
  void Run(const ReplayClient::Episode& episode, uint64_t specification_hash) {
    for (int64_t row = 0; !finished_; ++row) {
      const Chunk chunk = ProbeChunk(episode, specification_hash, row, /*rows=*/1);
      status_ = writer_->Append(chunk, absl::Now() + absl::Seconds(120));
      if (status_.ok()) status_ = writer_->Flush(absl::Now() + absl::Seconds(120));
      if (!status_.ok()) return;
      {
        absl::MutexLock lock(&mu_);
        acknowledged_[chunk.info.key] = chunk.payload;
      }
      absl::SleepFor(absl::Milliseconds(100));
    }
  }

  mutable absl::Mutex mu_;
  std::map<ChunkKey, std::string> acknowledged_ ABSL_GUARDED_BY(mu_);
  std::atomic<bool> finished_ = false;
  absl::Status status_;  // of the thread
  const std::unique_ptr<ReplayWriter> writer_;
  std::thread thread_;
};

// A client of the planner, with retries: one agent that sees black pictures.
class Player {
 public:
  explicit Player(const std::string& planner) : client_(MakeChannel(planner).value()), thread_([this] { Run(); }) {}
  ~Player() { Finish(); }
  int64_t answers() const { return answers_; }
  // The errors so far.
  std::vector<std::string> Finish() {
    finished_ = true;
    if (thread_.joinable()) thread_.join();
    return errors_;
  }

 private:
  void Run() {
    planner::v1::ActRequest request;
    request.set_client_id("player");
    planner::v1::Slot& slot = *request.add_slots();
    common::v1::NamedTensor& image = *slot.add_observations();
    image.set_name("image");
    image.mutable_tensor()->set_data_type(common::v1::UINT8);
    for (const int64_t size : {32, 32, 3}) image.mutable_tensor()->add_shape(size);
    image.mutable_tensor()->set_data(std::string(32 * 32 * 3, '\0'));
    while (!finished_) {
      const absl::StatusOr<planner::v1::ActResponse> response = client_.Act(request, absl::Now() + absl::Seconds(30));
      if (response.ok()) {
        slot.set_belief(response->results(0).belief());
        *slot.mutable_previous_action() = response->results(0).action();
        answers_ += 1;
      } else {
        errors_.push_back(response.status().ToString());
        absl::SleepFor(absl::Milliseconds(100));
      }
    }
  }

  PlannerClient client_;
  std::atomic<int64_t> answers_ = 0;
  std::atomic<bool> finished_ = false;
  std::vector<std::string> errors_;  // of the thread
  std::thread thread_;
};

class SystemTest : public ::testing::Test {
 protected:
  void SetUp() override {
    config_ = dir_ / "config.textproto";
    ASSERT_OK(WriteFileAtomically(config_, kConfig));
    ASSERT_OK(MakeDirectory(dir_ / "redis"));
    ASSERT_OK_AND_ASSIGN(redis_, RedisServer::Start(dir_ / "redis"));
    Start("replay");
    ASSERT_OK_AND_ASSIGN(replay_channel_, MakeChannel(Address("replay")));
    client_ = std::make_unique<ReplayClient>(replay_channel_, "system_test");
  }

  void StartOthers(int actors = 2) {
    for (const char* name : {"learner", "planner"}) Start(name);
    for (int i = 0; i < actors; ++i) Start(absl::StrCat("actor-", i));
  }

  void TearDown() override {
    for (auto& [name, process] : processes_) process->Kill();
    if (!HasFailure()) return;
    for (auto& [name, process] : processes_) {
      std::cerr << "---- " << name << "\n" << process->Log() << "\n";
    }
  }

  // A process that is started again keeps its ports.
  static int Port(std::map<std::string, int>& ports, const std::string& name) {
    int& port = ports[name];
    if (port == 0) port = FreePort().value();
    return port;
  }
  std::string Address(const std::string& name) { return absl::StrCat("127.0.0.1:", Port(ports_, name)); }
  std::string Metrics(const std::string& name) { return HttpGet(Port(metrics_ports_, name), "/metrics"); }

  void Start(const std::string& name) {
    const std::string service = name.substr(0, name.find('-'));
    std::vector<std::string> argv = {absl::StrCat(ORRERY_BIN_DIR, "/orrery-", service), "--config", config_,
                                     "--metrics_listen", absl::StrCat("127.0.0.1:", Port(metrics_ports_, name))};
    auto add = [&argv](std::vector<std::string> more) { argv.insert(argv.end(), more.begin(), more.end()); };
    if (service != "actor") {
      add({"--listen", Address(name), "--health_listen", absl::StrCat("127.0.0.1:", Port(health_ports_, name))});
    }
    if (service == "replay") add({"--store", redis_->url()});
    if (service == "learner") {
      add({"--replay", Address("replay"), "--checkpoint_dir", dir_ / "checkpoints", "--resume", "--threads", "1"});
    }
    if (service == "planner") {
      add({"--learner", Address("learner"), "--replay", Address("replay"), "--threads", "1"});
    }
    if (service == "actor") {
      add({"--replay", Address("replay"), "--planner", Address("planner"), "--actor_id", name});
    }
    processes_[name] = std::make_unique<Process>(std::move(argv), dir_ / (name + ".log"));
  }

  replay::v1::GetStatsResponse Stats() {
    auto stats = client_->GetStats(absl::Now() + absl::Seconds(5));
    return stats.ok() ? *stats : replay::v1::GetStatsResponse();
  }

  // Rows and updates both go on from where they are now.
  bool MakesProgress(absl::Duration timeout) {
    replay::v1::GetStatsResponse begin;
    if (!Eventually(timeout, [&] { return (begin = Stats()).rows_appended() > 0; })) return false;
    return Eventually(timeout, [&] {
      const auto now = Stats();
      return now.rows_appended() >= begin.rows_appended() + 50 && now.updates_done() >= begin.updates_done() + 10 &&
             now.snapshot_version().counter() > begin.snapshot_version().counter();
    });
  }

  // Everything that was ever visible or acknowledged is in Redis, read by a store that no service had open.
  void ExpectAllInRedis(const std::map<ChunkKey, std::string>& seen) {
    for (auto& [name, process] : processes_) process->Kill();
    ASSERT_OK_AND_ASSIGN(auto store, OpenStore({redis_->url(), "system_test", 4, absl::Seconds(5)}));
    ASSERT_GT(seen.size(), 20u);
    for (const auto& [key, payload] : seen) {
      ASSERT_OK_AND_ASSIGN(auto chunks, store->Read({key}));
      ASSERT_TRUE(chunks[0].has_value()) << "episode " << key.episode_id << " row " << key.first_row << " is lost";
      EXPECT_EQ(chunks[0]->payload, payload);
    }
  }

  TempDir dir_;
  std::string config_;
  std::unique_ptr<RedisServer> redis_;
  std::map<std::string, int> ports_, health_ports_, metrics_ports_;
  std::map<std::string, std::unique_ptr<Process>> processes_;
  std::shared_ptr<grpc::Channel> replay_channel_;
  std::unique_ptr<ReplayClient> client_;
};

TEST_F(SystemTest, LearnsAndSurvivesTheDeathOfEveryService) {
  StartOthers();
  Witness witness(replay_channel_, "system_test");
  ASSERT_TRUE(MakesProgress(absl::Seconds(90))) << Stats().DebugString();
  const double first_loss = MetricValue(Metrics("learner"), "orrery_learner_loss{term=\"total\"}");
  ASSERT_GT(first_loss, 0);

  for (const char* name : {"actor-0", "planner", "learner", "replay"}) {
    SCOPED_TRACE(name);
    processes_[name]->Kill();
    Start(name);
    ASSERT_TRUE(MakesProgress(absl::Seconds(90))) << Stats().DebugString();
  }
  {
    SCOPED_TRACE("redis");
    redis_->Kill();
    ASSERT_OK(redis_->Restart());
    ASSERT_TRUE(MakesProgress(absl::Seconds(90))) << Stats().DebugString();
  }

  EXPECT_TRUE(Eventually(absl::Seconds(90), [&] {
    const double loss = MetricValue(Metrics("learner"), "orrery_learner_loss{term=\"total\"}");
    return loss > 0 && loss < 0.7 * first_loss;
  })) << "the loss stayed near " << first_loss;

  ExpectAllInRedis(witness.chunks());
}

// Every service is restarted while all others work. A client that retries notices nothing, and nothing is lost: neither what
// was visible nor what a writer was told is stored.
TEST_F(SystemTest, RollingRestartsUnderLoadFailNobody) {
  StartOthers(4);
  Witness witness(replay_channel_, "system_test");
  ASSERT_TRUE(MakesProgress(absl::Seconds(120))) << Stats().DebugString();
  Player player(Address("planner"));
  ASSERT_OK_AND_ASSIGN(auto environment, MakeEnvironment({.task = "point_pixels", .image_size = 32}));
  const uint64_t hash = Hash(environment->spec());
  ASSERT_OK_AND_ASSIGN(auto episode, client_->BeginEpisode("probe", hash, absl::Now() + absl::Seconds(120)));
  ASSERT_TRUE(episode.has_value());
  // Rows of an episode whose lease has run out are stored but not counted: MakesProgress sees those of the actors only.
  absl::SleepFor(absl::Seconds(episode->lease_seconds + 1));
  ProbeWriter writer(replay_channel_, *episode, hash);
  for (const char* name : {"replay", "planner", "learner", "actor-0", "actor-1", "actor-2", "actor-3"}) {
    SCOPED_TRACE(name);
    processes_[name]->Signal(SIGTERM);
    ASSERT_EQ(processes_[name]->Wait(absl::Seconds(20)), 0) << processes_[name]->Log();
    Start(name);
    const int64_t answers = player.answers();
    const size_t acknowledged = writer.acknowledged();
    ASSERT_TRUE(MakesProgress(absl::Seconds(120))) << Stats().DebugString();
    ASSERT_TRUE(Eventually(absl::Seconds(30), [&] { return player.answers() > answers; }));
    ASSERT_TRUE(Eventually(absl::Seconds(120), [&] { return writer.acknowledged() >= acknowledged + 3; }))
        << writer.Finish().status();
  }
  EXPECT_EQ(player.Finish(), std::vector<std::string>());
  ASSERT_OK_AND_ASSIGN(const auto acknowledged, writer.Finish());
  for (int i = 0; i < 4; ++i) {
    EXPECT_THAT(processes_[absl::StrCat("actor-", i)]->Log(), ::testing::Not(::testing::HasSubstr("episode dropped")));
  }
  ExpectAllInRedis(witness.chunks());
  ExpectAllInRedis(acknowledged);
}

// ORRERY_LOAD_ACTORS=64 is the long form: four times what a batch holds, and twice what batch and queue hold together.
TEST_F(SystemTest, ManyActorsShareOnePlanner) {
  const char* const given = std::getenv("ORRERY_LOAD_ACTORS");
  const int actors = given == nullptr ? 8 : std::atoi(given);
  StartOthers(actors);
  ASSERT_TRUE(MakesProgress(absl::Seconds(300))) << Stats().DebugString();
  const auto begin = Stats();
  const absl::Time since = absl::Now();
  ASSERT_TRUE(Eventually(absl::Seconds(300), [&] {
    return Stats().rows_appended() >= begin.rows_appended() + 100 * actors;
  })) << Stats().DebugString();
  const std::string planner = Metrics("planner"), replay = Metrics("replay");
  const double batches = MetricValue(planner, "orrery_planner_batch_size_count");
  const double slots = MetricValue(planner, "orrery_planner_batch_size_sum");
  std::printf("%d actors: %.1f rows/s appended, %.1f slots to a batch\n", actors,
              static_cast<double>(Stats().rows_appended() - begin.rows_appended()) / absl::ToDoubleSeconds(absl::Now() - since),
              slots / batches);
  const int most = std::min(actors, config::v1::PlannerService().max_batch());
  EXPECT_GT(slots / batches, most / 4.0) << "the planner does not batch";
  EXPECT_EQ(MetricValue(planner, "orrery_planner_requests_total{code=\"INTERNAL\",model=\"system_test\"}"), 0);
  for (auto& [name, process] : processes_) EXPECT_TRUE(process->Running()) << name << "\n" << process->Log();
}

// Chunks that the test itself was told are stored are there after replay died and an empty one took over elsewhere.
TEST_F(SystemTest, AnEmptyReplayElsewhereServesEveryAcknowledgedChunk) {
  ASSERT_OK_AND_ASSIGN(auto environment, MakeEnvironment({.task = "point_pixels", .image_size = 32}));
  const uint64_t hash = Hash(environment->spec());
  ASSERT_OK_AND_ASSIGN(auto episode, client_->BeginEpisode("probe", hash, absl::Now() + absl::Seconds(20)));
  ASSERT_TRUE(episode.has_value());
  auto writer = ReplayWriter::Create(replay_channel_, "system_test", {});
  std::vector<Chunk> sent;
  for (int i = 0; i < 40; ++i) {
    sent.push_back(ProbeChunk(*episode, hash, i * 10));
    ASSERT_OK(writer->Append(sent.back(), absl::Now() + absl::Seconds(10)));
  }
  ASSERT_OK(writer->Flush(absl::Now() + absl::Seconds(20)));
  processes_["replay"]->Kill();

  ports_["replay"] = FreePort().value();
  Start("replay");
  ASSERT_OK_AND_ASSIGN(auto channel, MakeChannel(Address("replay")));
  auto watcher = ChunkWatcher::Create(channel, "system_test");
  std::map<int64_t, std::string> found;
  while (found.size() < sent.size()) {
    ASSERT_OK_AND_ASSIGN(auto event, watcher->Next(absl::Now() + absl::Seconds(30)));
    if (event.appended) found[event.appended->info.key.first_row] = event.appended->payload;
  }
  for (const Chunk& chunk : sent) EXPECT_EQ(found[chunk.info.key.first_row], chunk.payload);
}

TEST_F(SystemTest, EveryServiceEndsCleanlyOnSigterm) {
  StartOthers();
  ASSERT_TRUE(MakesProgress(absl::Seconds(90))) << Stats().DebugString();
  EXPECT_THAT(Metrics("replay"), ::testing::HasSubstr("orrery_replay_steps_appended_total"));
  EXPECT_THAT(Metrics("planner"), ::testing::HasSubstr("orrery_planner_batch_size"));
  EXPECT_THAT(Metrics("actor-0"), ::testing::HasSubstr("orrery_actor_env_steps_total"));
  for (const char* name : {"actor-0", "actor-1", "planner", "learner", "replay"}) {
    processes_[name]->Signal(SIGTERM);
    EXPECT_EQ(processes_[name]->Wait(absl::Seconds(20)), 0) << name << "\n" << processes_[name]->Log();
  }
}

}  // namespace
}  // namespace orrery
