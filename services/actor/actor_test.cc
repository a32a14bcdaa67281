#include "services/actor/actor.h"

#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "libs/base/log_testing.h"
#include "libs/base/status.h"
#include "libs/base/status_matchers.h"
#include "libs/base/trace.h"
#include "libs/replay/chunk_codec.h"
#include "libs/telemetry/call_trace.h"

namespace orrery {
namespace {
// Empty: it was not sent.
std::string Metadata(const grpc::ServerContext& context, const std::string& key) {
  const auto found = context.client_metadata().find(key);
  return found == context.client_metadata().end() ? "" : std::string(found->second.data(), found->second.size());
}

// "" where that is no `traceparent`.
std::string TraceIdOf(const std::string& traceparent) {
  const std::optional<TraceContext> context = ParseTraceparent(traceparent);
  return context.has_value() ? context->trace_id() : "";
}

// Counts its steps: "image" is filled with the step, "position" repeats the last action, the reward of step t is t.
class CountingEnvironment : public Environment {
 public:
  // `spoil` may change what is delivered, or fail in its place.
  using Spoil = std::function<absl::Status(int step, TimeStep&)>;
  CountingEnvironment(int steps, bool terminal, Spoil spoil = {}) : steps_(steps), terminal_(terminal), spoil_(std::move(spoil)) {
    spec_.observations = {{"image", DType::kUInt8, {2, 2, 3}}, {"position", DType::kFloat32, {2}}};
    spec_.action.size = 2;
  }
  const EnvironmentSpec& spec() const override { return spec_; }
  absl::StatusOr<TimeStep> Reset(uint64_t) override {
    step_ = 0;
    TimeStep step = At({0.0f, 0.0f});
    if (spoil_) RETURN_IF_ERROR(spoil_(step_, step));
    return step;
  }
  absl::StatusOr<TimeStep> Step(absl::Span<const float> action) override {
    if (step_ >= steps_) return absl::FailedPreconditionError("the episode has ended");
    step_ += 1;
    TimeStep step = At(action);
    step.reward = step_;
    step.is_last = step_ == steps_;
    step.is_terminal = step.is_last && terminal_;
    if (spoil_) RETURN_IF_ERROR(spoil_(step_, step));
    return step;
  }
  absl::StatusOr<Array> Render(int, int) override { return absl::UnimplementedError("no pictures for people"); }

 private:
  TimeStep At(absl::Span<const float> position) const {
    TimeStep step;
    step.observation["image"] = Array::From<uint8_t>(std::vector<uint8_t>(12, static_cast<uint8_t>(step_)), {2, 2, 3});
    step.observation["position"] = Array::From<float>(position, {2});
    return step;
  }

  const int steps_;
  const bool terminal_;
  const Spoil spoil_;
  EnvironmentSpec spec_;
  int step_ = 0;
};

// Hands out scripted episodes, then says that the run is complete; keeps what is appended.
class FakeReplay : public replay::v1::ReplayService::Service {
 public:
  struct Assigned {
    int64_t episode_id;
    replay::v1::EpisodeMode mode;
    uint64_t seed;
    std::string task = "counting";
  };
  grpc::Status BeginEpisode(grpc::ServerContext* context, const replay::v1::BeginEpisodeRequest*,
                            replay::v1::BeginEpisodeResponse* response) override {
    absl::MutexLock lock(&mu_);
    begun_.push_back(Metadata(*context, "traceparent"));
    while (hold_ && !context->IsCancelled()) changed_.WaitWithTimeout(&mu_, absl::Milliseconds(20));
    if (hold_) return {grpc::StatusCode::DEADLINE_EXCEEDED, "nothing may begin"};
    if (script_.empty()) {
      response->set_run_complete(true);
      return grpc::Status::OK;
    }
    response->set_run_id("run-id");
    response->set_episode_id(script_.front().episode_id);
    response->set_mode(script_.front().mode);
    response->set_task(script_.front().task);
    response->set_seed(script_.front().seed);
    response->set_lease_seconds(60);
    script_.pop_front();
    return grpc::Status::OK;
  }
  grpc::Status AppendChunks(
      grpc::ServerContext*,
      grpc::ServerReaderWriter<replay::v1::AppendChunksResponse, replay::v1::AppendChunksRequest>* stream) override {
    replay::v1::AppendChunksRequest request;
    while (stream->Read(&request)) {
      if (!request.has_chunk()) continue;
      {
        absl::MutexLock lock(&mu_);
        if (request.chunk().episode_id() == refused_) return {grpc::StatusCode::ALREADY_EXISTS, "other contents"};
        chunks_.push_back(request.chunk());
        appended_.emplace_back(request.chunk().episode_id(), request.traceparent());
      }
      replay::v1::AppendChunksResponse response;
      response.set_episode_id(request.chunk().episode_id());
      response.set_first_row(request.chunk().first_row());
      stream->Write(response);
    }
    return grpc::Status::OK;
  }
  void Assign(std::deque<Assigned> script) {
    absl::MutexLock lock(&mu_);
    script_ = std::move(script);
  }
  void Hold() {
    absl::MutexLock lock(&mu_);
    hold_ = true;
  }
  void Refuse(int64_t episode_id) {
    absl::MutexLock lock(&mu_);
    refused_ = episode_id;
  }
  std::vector<replay::v1::Chunk> chunks() {
    absl::MutexLock lock(&mu_);
    return chunks_;
  }
  // What came as `traceparent` with each call of BeginEpisode.
  std::vector<std::string> begun() {
    absl::MutexLock lock(&mu_);
    return begun_;
  }
  // The same of each chunk, with its episode.
  std::vector<std::pair<int64_t, std::string>> appended() {
    absl::MutexLock lock(&mu_);
    return appended_;
  }

 private:
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::deque<Assigned> script_ ABSL_GUARDED_BY(mu_);
  bool hold_ ABSL_GUARDED_BY(mu_) = false;
  int64_t refused_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<replay::v1::Chunk> chunks_ ABSL_GUARDED_BY(mu_);
  std::vector<std::string> begun_ ABSL_GUARDED_BY(mu_);
  std::vector<std::pair<int64_t, std::string>> appended_ ABSL_GUARDED_BY(mu_);
};

// Answers with action (0.25, -0.5, 0, …) and the belief "belief-N" for the N-th request; or with queued errors first.
class FakePlanner : public planner::v1::PlannerService::Service {
 public:
  grpc::Status Act(grpc::ServerContext* context, const planner::v1::ActRequest* request,
                   planner::v1::ActResponse* response) override {
    absl::MutexLock lock(&mu_);
    requests_.push_back(*request);
    traces_.emplace_back(Metadata(*context, "traceparent"), Metadata(*context, kTraceLinksKey));
    changed_.SignalAll();
    while (hold_ && !context->IsCancelled()) changed_.WaitWithTimeout(&mu_, absl::Milliseconds(20));
    if (!errors_.empty()) {
      const grpc::Status error = errors_.front();
      errors_.pop_front();
      if (!error.ok()) return error;
    }
    for (int i = 0; i < request->slots_size() - missing_results_; ++i) {
      planner::v1::SlotResult* result = response->add_results();
      result->add_action(0.25f);
      result->add_action(-0.5f);
      result->mutable_action()->Resize(action_size_, 0.0f);
      result->set_belief(absl::StrCat("belief-", requests_.size()));
    }
    // What was asked for, else a new snapshot for every request.
    response->mutable_snapshot_version()->set_generation(1);
    response->mutable_snapshot_version()->set_counter(static_cast<int64_t>(requests_.size()));
    if (request->has_snapshot_version()) *response->mutable_snapshot_version() = request->snapshot_version();
    return grpc::Status::OK;
  }
  void Answer(int action_size, int missing_results) {
    absl::MutexLock lock(&mu_);
    action_size_ = action_size;
    missing_results_ = missing_results;
  }
  // OK entries let a request pass.
  void Fail(std::deque<grpc::Status> errors) {
    absl::MutexLock lock(&mu_);
    errors_ = std::move(errors);
  }
  void Hold() {
    absl::MutexLock lock(&mu_);
    hold_ = true;
  }
  void AwaitRequest() {
    absl::MutexLock lock(&mu_);
    while (requests_.empty()) changed_.Wait(&mu_);
  }
  std::vector<planner::v1::ActRequest> requests() {
    absl::MutexLock lock(&mu_);
    return requests_;
  }
  // `traceparent` and links of each request.
  std::vector<std::pair<std::string, std::string>> traces() {
    absl::MutexLock lock(&mu_);
    return traces_;
  }

 private:
  absl::Mutex mu_;
  absl::CondVar changed_;
  bool hold_ ABSL_GUARDED_BY(mu_) = false;
  int action_size_ ABSL_GUARDED_BY(mu_) = 2;
  int missing_results_ ABSL_GUARDED_BY(mu_) = 0;
  std::deque<grpc::Status> errors_ ABSL_GUARDED_BY(mu_);
  std::vector<planner::v1::ActRequest> requests_ ABSL_GUARDED_BY(mu_);
  std::vector<std::pair<std::string, std::string>> traces_ ABSL_GUARDED_BY(mu_);
};

class ActorTest : public testing::Test {
 protected:
  ActorTest() {
    experiment_.set_name("test");
    experiment_.mutable_environment()->set_task("counting");
    experiment_.mutable_environment()->set_action_repeat(4);
    experiment_.mutable_replay()->set_chunk_rows(4);
    grpc::ServerBuilder builder;
    builder.RegisterService(&replay_);
    builder.RegisterService(&planner_);
    server_ = builder.BuildAndStart();
  }
  ~ActorTest() override { server_->Shutdown(absl::ToChronoTime(absl::Now())); }

  std::unique_ptr<Actor> MakeActor() {
    ActorOptions options;
    options.model = "of the test";
    options.experiment = experiment_;
    options.actor_id = "actor-1";
    options.replay = server_->InProcessChannel({});
    options.planner = server_->InProcessChannel({});
    options.registry = registry_;
    options.on_episode = [this](const EpisodeSummary& summary) {
      summaries_.push_back(summary);
      if (on_episode_) on_episode_();
    };
    options.make_environment = [this](const EnvironmentOptions& made) -> absl::StatusOr<std::unique_ptr<Environment>> {
      absl::MutexLock lock(&mu_);
      made_.push_back(absl::StrCat(made.task, " ", made.action_size));
      return std::make_unique<CountingEnvironment>(steps_, terminal_, spoil_);
    };
    options.environment_timeout = environment_timeout_;
    options.patience = patience_;
    options.act_timeout = act_timeout_;
    auto actor = Actor::Create(std::move(options));
    EXPECT_OK(actor);
    return std::move(*actor);
  }
  // All rows of an episode, decoded and in order of the chunks; checks that the chunks follow each other.
  ArrayMap Rows(int64_t episode_id) {
    ArrayMap all;
    int64_t next = 0;
    for (const replay::v1::Chunk& chunk : replay_.chunks()) {
      if (chunk.episode_id() != episode_id) continue;
      EXPECT_EQ(chunk.first_row(), next);
      next += chunk.rows();
      auto rows = DecodeRows(chunk.payload(), chunk.rows());
      EXPECT_OK(rows);
      for (const auto& [name, array] : *rows) {
        Array& field = all[name];
        if (field.shape.empty()) {
          field = array;
        } else {
          field.shape[0] += array.shape[0];
          field.bytes += array.bytes;
        }
      }
    }
    return all;
  }

  int steps_ = 9;
  bool terminal_ = false;
  CountingEnvironment::Spoil spoil_;
  config::v1::Experiment experiment_;
  FakeReplay replay_;
  FakePlanner planner_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
  absl::Duration environment_timeout_ = absl::Seconds(60);
  absl::Duration act_timeout_ = absl::Seconds(60);
  absl::Duration patience_ = absl::InfiniteDuration();  // environments are waited for, so that requests can be counted
  std::function<void()> on_episode_;
  std::vector<EpisodeSummary> summaries_;
  absl::Mutex mu_;                 // environments are made on several threads
  std::vector<std::string> made_;  // environments: task and padded size
};

TEST_F(ActorTest, SendsARandomEpisodeInChunks) {
  replay_.Assign({{7, replay::v1::RANDOM, 42}});
  ASSERT_OK(MakeActor()->Run());

  const std::vector<replay::v1::Chunk> chunks = replay_.chunks();
  ASSERT_EQ(chunks.size(), 3u);
  const int rows[] = {4, 4, 2};
  const double rewards[] = {1 + 2 + 3, 4 + 5 + 6 + 7, 8 + 9};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(chunks[i].run_id(), "run-id");
    EXPECT_EQ(chunks[i].episode_id(), 7);
    EXPECT_EQ(chunks[i].first_row(), 4 * i);
    EXPECT_EQ(chunks[i].rows(), rows[i]);
    EXPECT_EQ(chunks[i].mode(), replay::v1::RANDOM);
    EXPECT_EQ(chunks[i].end(), i == 2 ? replay::v1::TRUNCATED : replay::v1::CONTINUES);
    EXPECT_DOUBLE_EQ(chunks[i].reward_sum(), rewards[i]);
    EXPECT_EQ(chunks[i].specification_hash(), Hash(CountingEnvironment(1, false).spec()));
    EXPECT_EQ(chunks[i].snapshot_version().generation(), 0);
  }
  EXPECT_TRUE(planner_.requests().empty());

  const ArrayMap all = Rows(7);
  const auto reward = all.at(kReward).as<float>();
  const auto first = all.at(kIsFirst).as<uint8_t>();
  const auto action = all.at(kAction).as<float>();
  const auto position = all.at("position").as<float>();
  EXPECT_EQ(all.at("image").shape, (std::vector<int64_t>{10, 2, 2, 3}));
  for (int row = 0; row < 10; ++row) {
    EXPECT_EQ(reward[row], row);
    EXPECT_EQ(first[row], row == 0);
    EXPECT_EQ(all.at(kIsTerminal).as<uint8_t>()[row], 0);
    EXPECT_EQ(all.at("image").as<uint8_t>()[12 * row], row);
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(action[2 * row + i], position[2 * row + i]) << "the action that led to the row";
      EXPECT_LE(std::abs(action[2 * row + i]), 1.0f);
      if (row > 0) {
        EXPECT_NE(action[2 * row + i], action[2 * row - 2 + i]);
      }
    }
  }
  EXPECT_EQ(action[0], 0.0f);
}

TEST_F(ActorTest, DrawsTheSameActionsFromTheSameSeed) {
  replay_.Assign({{1, replay::v1::RANDOM, 42}, {2, replay::v1::RANDOM, 42}, {3, replay::v1::RANDOM, 43}});
  ASSERT_OK(MakeActor()->Run());
  EXPECT_EQ(Rows(1).at(kAction), Rows(2).at(kAction));
  EXPECT_FALSE(Rows(1).at(kAction) == Rows(3).at(kAction));
}

TEST_F(ActorTest, StoresTheTerminalRow) {
  terminal_ = true;
  steps_ = 7;  // eight rows: the end falls on the end of a chunk
  replay_.Assign({{1, replay::v1::RANDOM, 1}});
  ASSERT_OK(MakeActor()->Run());
  ASSERT_EQ(replay_.chunks().size(), 2u);
  EXPECT_EQ(replay_.chunks()[0].end(), replay::v1::CONTINUES);
  EXPECT_EQ(replay_.chunks()[1].end(), replay::v1::TERMINATED);
  const ArrayMap all = Rows(1);
  for (int row = 0; row < 8; ++row) EXPECT_EQ(all.at(kIsTerminal).as<uint8_t>()[row], row == 7);
}

TEST_F(ActorTest, EndsCollectedEpisodesThatHaveFailed) {
  // The reward of row i is i: rows 1, 2 and 3 fail.
  experiment_.mutable_collection()->mutable_early_end()->set_reward_below(4);
  experiment_.mutable_collection()->mutable_early_end()->set_failed_rows(3);
  replay_.Assign({{1, replay::v1::RANDOM, 1}, {2, replay::v1::TRAIN, 1}, {3, replay::v1::EVALUATE, 1}});
  ASSERT_OK(MakeActor()->Run());
  EXPECT_EQ(Rows(1).at(kReward).size(), 4);
  EXPECT_EQ(Rows(2).at(kReward).size(), 4) << "counted anew in every episode";
  EXPECT_EQ(Rows(3).at(kReward).size(), 10) << "evaluations are never cut";
  EXPECT_EQ(replay_.chunks()[0].end(), replay::v1::TRUNCATED);
  ASSERT_EQ(summaries_.size(), 3u);
  EXPECT_EQ(summaries_[0].end, EpisodeEnd::kTruncated);
}

TEST_F(ActorTest, PlaysOnWithFewerFailedRows) {
  experiment_.mutable_collection()->mutable_early_end()->set_reward_below(4);
  experiment_.mutable_collection()->mutable_early_end()->set_failed_rows(4);
  replay_.Assign({{1, replay::v1::RANDOM, 1}});
  ASSERT_OK(MakeActor()->Run());
  EXPECT_EQ(Rows(1).at(kReward).size(), 10) << "three rows have failed";
}

TEST_F(ActorTest, ReportsTheEpisode) {
  replay_.Assign({{5, replay::v1::EVALUATE, 1}});
  ASSERT_OK(MakeActor()->Run());
  ASSERT_EQ(summaries_.size(), 1u);
  EXPECT_EQ(summaries_[0].episode_id, 5);
  EXPECT_EQ(summaries_[0].mode, EpisodeMode::kEvaluate);
  EXPECT_EQ(summaries_[0].episode_return, 45);
  EXPECT_EQ(summaries_[0].rows, 10);
  EXPECT_EQ(summaries_[0].environment_steps, 36);
}

TEST_F(ActorTest, AsksThePlannerWithBeliefActionAndNoise) {
  replay_.Assign({{1, replay::v1::TRAIN, 11}, {2, replay::v1::EVALUATE, 11}});
  ASSERT_OK(MakeActor()->Run());
  const std::vector<planner::v1::ActRequest> requests = planner_.requests();
  ASSERT_EQ(requests.size(), 18u);
  std::set<uint64_t> seeds;
  for (int i = 0; i < 18; ++i) {
    ASSERT_EQ(requests[i].slots_size(), 1);
    const planner::v1::Slot& slot = requests[i].slots(0);
    const bool train = i < 9;
    EXPECT_EQ(requests[i].client_id(), "actor-1");
    EXPECT_EQ(requests[i].model(), "of the test");
    EXPECT_EQ(requests[i].priority(), train ? planner::v1::EXPLORATION : planner::v1::EVALUATION);
    EXPECT_FLOAT_EQ(slot.exploration_noise(), train ? 0.3f : 0.0f);
    EXPECT_EQ(slot.belief(), i % 9 == 0 ? "" : absl::StrCat("belief-", i));
    EXPECT_EQ(slot.previous_action_size(), i % 9 == 0 ? 0 : 2);
    ASSERT_EQ(slot.observations_size(), 2);
    EXPECT_EQ(slot.observations(0).name(), "image");
    EXPECT_EQ(slot.observations(0).tensor().data_type(), common::v1::UINT8);
    EXPECT_EQ(slot.observations(0).tensor().data(), std::string(12, static_cast<char>(i % 9)));
    seeds.insert(slot.seed());
    if (!train) {
      EXPECT_EQ(slot.seed(), requests[i - 9].slots(0).seed()) << "from the episode's seed and the row";
    }
  }
  EXPECT_EQ(seeds.size(), 9u);
  // Rows 1 to 3 of the first chunk came from answers 1 to 3, rows 4 to 7 of the second from 4 to 7.
  EXPECT_EQ(replay_.chunks()[0].snapshot_version().counter(), 3);
  EXPECT_EQ(replay_.chunks()[1].snapshot_version().counter(), 7);
  const ArrayMap all = Rows(1);
  EXPECT_EQ(all.at(kAction).as<float>()[2], 0.25f);
  EXPECT_EQ(all.at(kAction).as<float>()[3], -0.5f);
}

TEST_F(ActorTest, AsksOnceForAllEnvironments) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  experiment_.mutable_collection()->set_environments(3);
  replay_.Assign({{1, replay::v1::TRAIN, 1}, {2, replay::v1::TRAIN, 2}, {3, replay::v1::TRAIN, 3}});
  ASSERT_OK(MakeActor()->Run());
  ASSERT_EQ(planner_.requests().size(), 9u);
  for (const planner::v1::ActRequest& request : planner_.requests()) {
    ASSERT_EQ(request.slots_size(), 3);
    EXPECT_NE(request.slots(0).seed(), request.slots(1).seed());
  }
  for (int64_t id : {1, 2, 3}) EXPECT_EQ(Rows(id).at(kReward).size(), 10);
}

TEST_F(ActorTest, AnEpisodeIsOneTrace) {
  replay_.Assign({{1, replay::v1::TRAIN, 1}, {2, replay::v1::EVALUATE, 2}});
  std::vector<std::string> noted;
  on_episode_ = [&noted] { noted.push_back(CurrentTrace().trace_id()); };
  ASSERT_OK(MakeActor()->Run());
  const std::vector<std::string> begun = replay_.begun();
  ASSERT_EQ(begun.size(), 3u);  // the last one says that the run is complete
  const std::string ids[] = {TraceIdOf(begun[0]), TraceIdOf(begun[1]), TraceIdOf(begun[2])};
  EXPECT_EQ(std::set<std::string>(std::begin(ids), std::end(ids)).size(), 3u);
  EXPECT_EQ(noted, (std::vector<std::string>{ids[0], ids[1]}));
  std::set<std::string> spans(begun.begin(), begun.end());
  const std::vector<std::pair<std::string, std::string>> asked = planner_.traces();
  ASSERT_EQ(asked.size(), 18u);
  for (size_t i = 0; i < asked.size(); ++i) {
    const auto& [traceparent, links] = asked[i];
    EXPECT_EQ(TraceIdOf(traceparent), ids[i / 9]) << i;
    EXPECT_EQ(links, "");
    EXPECT_TRUE(spans.insert(traceparent).second) << "each call is a span of its own";
  }
  ASSERT_EQ(replay_.appended().size(), 6u);
  for (const auto& [episode, traceparent] : replay_.appended()) {
    EXPECT_EQ(TraceIdOf(traceparent), ids[episode - 1]) << episode;
    EXPECT_TRUE(spans.insert(traceparent).second);
  }
}

TEST_F(ActorTest, ASharedRequestNamesTheTracesOfAllItsEpisodes) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  experiment_.mutable_collection()->set_environments(3);
  replay_.Assign({{1, replay::v1::TRAIN, 1}, {2, replay::v1::TRAIN, 2}, {3, replay::v1::TRAIN, 3}});
  ASSERT_OK(MakeActor()->Run());
  const std::vector<std::string> begun = replay_.begun();
  ASSERT_GE(begun.size(), 3u);
  ASSERT_EQ(planner_.traces().size(), 9u);
  for (const auto& [traceparent, links] : planner_.traces()) {
    EXPECT_EQ(TraceIdOf(traceparent), TraceIdOf(begun[0]));
    EXPECT_EQ(links, absl::StrCat(TraceIdOf(begun[1]), ",", TraceIdOf(begun[2])));
  }
  for (const auto& [episode, traceparent] : replay_.appended()) {
    EXPECT_EQ(TraceIdOf(traceparent), TraceIdOf(begun[static_cast<size_t>(episode - 1)])) << episode;
  }
}

TEST_F(ActorTest, LogsARefusedEpisodeInItsTrace) {
  CapturedLog log("warning");
  replay_.Refuse(1);
  replay_.Assign({{1, replay::v1::RANDOM, 1}});
  ASSERT_OK(MakeActor()->Run());
  ASSERT_FALSE(replay_.begun().empty());
  const std::string id = TraceIdOf(replay_.begun()[0]);
  ASSERT_NE(id, "");
  EXPECT_THAT(log.Take(), ::testing::ContainsRegex(absl::StrCat("replay refused episode=1 [^\n]* trace_id=", id, "\n")));
}

// Whatever the number of environments, whoever is ready first.
TEST_F(ActorTest, AnEpisodeDoesNotDependOnTheOthers) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  patience_ = absl::ZeroDuration();
  int64_t first_id = 0;
  for (const int environments : {1, 2, 5}) {
    experiment_.mutable_collection()->set_environments(environments);
    std::deque<FakeReplay::Assigned> script;
    for (int64_t i = 1; i <= 8; ++i) {
      script.push_back({first_id + i, i % 3 == 0 ? replay::v1::TRAIN : replay::v1::RANDOM, static_cast<uint64_t>(i)});
    }
    replay_.Assign(script);
    ASSERT_OK(MakeActor()->Run());
    for (int64_t i = 1; i <= 8; ++i) {
      EXPECT_EQ(Rows(first_id + i), Rows(i)) << environments << " environments, episode " << i;
      EXPECT_EQ(Rows(first_id + i).at(kReward).size(), 10);
    }
    first_id += 100;
  }
  EXPECT_FALSE(Rows(1).at(kAction) == Rows(2).at(kAction));
}

TEST_F(ActorTest, AnEnvironmentThatTakesLongDoesNotHoldUpTheOthers) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  experiment_.mutable_collection()->set_environments(3);
  patience_ = absl::ZeroDuration();
  std::atomic<bool> first = true;
  absl::Notification others_played;
  spoil_ = [&](int step, TimeStep&) {
    if (step == 3 && first.exchange(false)) others_played.WaitForNotification();
    return absl::OkStatus();
  };
  on_episode_ = [&] {
    if (summaries_.size() == 5) others_played.Notify();
  };
  std::deque<FakeReplay::Assigned> script;
  for (int64_t i = 1; i <= 6; ++i) script.push_back({i, replay::v1::TRAIN, static_cast<uint64_t>(i)});
  replay_.Assign(script);
  ASSERT_OK(MakeActor()->Run());
  EXPECT_EQ(summaries_.size(), 6u);
  for (int64_t id = 1; id <= 6; ++id) EXPECT_EQ(Rows(id).at(kReward).size(), 10);
}

TEST_F(ActorTest, GivesUpEnvironmentsThatDoNotReturn) {
  environment_timeout_ = absl::Milliseconds(50);
  const auto released = std::make_shared<absl::Notification>();
  spoil_ = [released](int step, TimeStep&) {
    if (step == 3) released->WaitForNotification();
    return absl::OkStatus();
  };
  std::deque<FakeReplay::Assigned> script;
  for (int i = 1; i <= Actor::kMaxFailures; ++i) script.push_back({i, replay::v1::RANDOM, 1});
  replay_.Assign(script);
  EXPECT_THAT(MakeActor()->Run(), StatusIs(absl::StatusCode::kDeadlineExceeded,
                                           testing::AllOf(testing::HasSubstr("'counting' failed in episode 5"),
                                                          testing::HasSubstr("did not return within 50ms"))));
  for (const replay::v1::Chunk& chunk : replay_.chunks()) EXPECT_EQ(chunk.end(), replay::v1::TRUNCATED);
  released->Notify();
}

TEST_F(ActorTest, PlaysAnEvaluationWithOneSnapshot) {
  experiment_.mutable_learning()->set_schedule(config::v1::Learning::CONCURRENT);
  experiment_.mutable_collection()->set_environments(2);
  replay_.Assign({{1, replay::v1::TRAIN, 1}, {2, replay::v1::EVALUATE, 2}});
  ASSERT_OK(MakeActor()->Run());
  // Both together first; from then on the evaluation asks for the snapshot of that answer.
  const std::vector<planner::v1::ActRequest> requests = planner_.requests();
  ASSERT_EQ(requests.size(), 17u);
  EXPECT_EQ(requests[0].slots_size(), 2);
  EXPECT_FALSE(requests[0].has_snapshot_version());
  int pinned = 0;
  for (size_t i = 1; i < requests.size(); ++i) {
    EXPECT_EQ(requests[i].slots_size(), 1);
    EXPECT_EQ(requests[i].has_snapshot_version(), requests[i].priority() == planner::v1::EVALUATION);
    if (!requests[i].has_snapshot_version()) continue;
    EXPECT_EQ(requests[i].snapshot_version().counter(), 1);
    pinned += 1;
  }
  EXPECT_EQ(pinned, 8);
  for (const replay::v1::Chunk& chunk : replay_.chunks()) {
    if (chunk.episode_id() != 2) continue;
    EXPECT_EQ(chunk.snapshot_version().counter(), 1);
  }
}

TEST_F(ActorTest, KeepsTheEpisodeWhileThePlannerIsAway) {
  const grpc::Status away(grpc::StatusCode::UNAVAILABLE, "no snapshot yet");
  planner_.Fail({grpc::Status::OK, away, away});
  replay_.Assign({{1, replay::v1::TRAIN, 1}});
  ASSERT_OK(MakeActor()->Run());
  const std::vector<planner::v1::ActRequest> requests = planner_.requests();
  ASSERT_EQ(requests.size(), 11u);
  EXPECT_EQ(requests[1].slots(0).SerializeAsString(), requests[2].slots(0).SerializeAsString());
  EXPECT_EQ(requests[1].slots(0).SerializeAsString(), requests[3].slots(0).SerializeAsString());
  EXPECT_EQ(Rows(1).at(kReward).size(), 10);
}

// Such as of a planner whose device has no memory while a new snapshot is tried beside the one served.
TEST_F(ActorTest, KeepsTheEpisodeWhenACallFailsInsideThePlanner) {
  CapturedLog log("warning");
  const grpc::Status unknown(grpc::StatusCode::UNKNOWN, "Stream removed");
  planner_.Fail({grpc::Status::OK, {grpc::StatusCode::INTERNAL, "inference: out of memory"}, unknown});
  replay_.Assign({{1, replay::v1::TRAIN, 1}});
  ASSERT_OK(MakeActor()->Run());
  const std::vector<planner::v1::ActRequest> requests = planner_.requests();
  ASSERT_EQ(requests.size(), 11u);
  for (size_t again : {2u, 3u}) {
    EXPECT_EQ(requests[again].slots(0).SerializeAsString(), requests[1].slots(0).SerializeAsString()) << again;
  }
  EXPECT_EQ(Rows(1).at(kReward).size(), 10);
  EXPECT_THAT(log.Take(), testing::AllOf(testing::HasSubstr("the planner does not answer, trying again: INTERNAL: inference"),
                                         testing::Not(testing::HasSubstr("Stream removed"))))
      << "said once until the planner answers again";
}

TEST_F(ActorTest, AQueueThatIsFullForAMomentIsNoNews) {
  const grpc::Status full(grpc::StatusCode::RESOURCE_EXHAUSTED, "the queue is full");
  const auto play = [&](int64_t episode, size_t refusals) {
    CapturedLog log("info");
    planner_.Fail(std::deque<grpc::Status>(refusals, full));
    replay_.Assign({{episode, replay::v1::TRAIN, 1}});
    EXPECT_OK(MakeActor()->Run());
    EXPECT_EQ(Rows(episode).at(kReward).size(), 10);
    return log.Take();
  };
  EXPECT_THAT(play(1, 2), testing::Not(testing::HasSubstr("the planner")));
  act_timeout_ = absl::Milliseconds(500);
  EXPECT_THAT(play(2, 6), testing::AllOf(testing::HasSubstr("the planner does not answer, trying again: RESOURCE_EXHAUSTED"),
                                         testing::HasSubstr("the planner answers again")));
}

// The model is not of this environment, or its planner of another make: no later answer is better.
TEST_F(ActorTest, EndsWhenAnAnswerCannotBeExecuted) {
  replay_.Assign({{1, replay::v1::TRAIN, 1}, {2, replay::v1::TRAIN, 2}});
  planner_.Answer(/*action_size=*/3, /*missing_results=*/0);
  EXPECT_THAT(MakeActor()->Run(), StatusIs(absl::StatusCode::kFailedPrecondition,
                                           testing::HasSubstr("an action of 3 numbers, expected 2")));
  planner_.Answer(/*action_size=*/2, /*missing_results=*/1);
  EXPECT_THAT(MakeActor()->Run(), StatusIs(absl::StatusCode::kDataLoss, testing::HasSubstr("answered 0 slots, expected 1")));
  EXPECT_EQ(planner_.requests().size(), 2u) << "each was asked once";
}

TEST_F(ActorTest, BeginsANewBeliefWhenTheModelChanged) {
  planner_.Fail({grpc::Status::OK, {grpc::StatusCode::FAILED_PRECONDITION, "belief of another structure"}});
  replay_.Assign({{1, replay::v1::TRAIN, 1}});
  ASSERT_OK(MakeActor()->Run());
  const std::vector<planner::v1::ActRequest> requests = planner_.requests();
  ASSERT_EQ(requests.size(), 10u);
  EXPECT_EQ(requests[1].slots(0).belief(), "belief-1");
  EXPECT_EQ(requests[2].slots(0).belief(), "");
  EXPECT_EQ(requests[2].slots(0).previous_action_size(), 0);
  EXPECT_EQ(Rows(1).at(kReward).size(), 10);
}

TEST_F(ActorTest, EndsWhenThePlannerRefusesTheObservation) {
  planner_.Fail({{grpc::StatusCode::INVALID_ARGUMENT, "slot 0: 'image' is [2, 2, 3], expected [64, 64, 3]"}});
  replay_.Assign({{1, replay::v1::TRAIN, 1}});
  EXPECT_THAT(MakeActor()->Run(),
              StatusIs(absl::StatusCode::kInvalidArgument, testing::HasSubstr("expected [64, 64, 3]")));
}

TEST_F(ActorTest, DropsAnEpisodeThatReplayRefuses) {
  replay_.Refuse(1);
  replay_.Assign({{1, replay::v1::RANDOM, 1}, {2, replay::v1::RANDOM, 2}});
  ASSERT_OK(MakeActor()->Run());
  EXPECT_EQ(Rows(2).at(kReward).size(), 10);
}

TEST_F(ActorTest, StopsWhileThePlannerHangsAndMarksTheEpisodeTruncated) {
  planner_.Hold();
  replay_.Assign({{1, replay::v1::TRAIN, 1}});
  std::unique_ptr<Actor> actor = MakeActor();
  std::thread stopper([&] {
    planner_.AwaitRequest();
    actor->Stop();
  });
  const absl::Time begin = absl::Now();
  EXPECT_OK(actor->Run());
  EXPECT_LT(absl::Now() - begin, absl::Seconds(3));
  stopper.join();
  ASSERT_EQ(replay_.chunks().size(), 1u);
  EXPECT_EQ(replay_.chunks()[0].rows(), 1);
  EXPECT_EQ(replay_.chunks()[0].end(), replay::v1::TRUNCATED);
  EXPECT_TRUE(summaries_.empty()) << "the return of a part would be taken for that of an episode";
}

TEST_F(ActorTest, StopsWhileNoEpisodeMayBegin) {
  replay_.Hold();
  std::unique_ptr<Actor> actor = MakeActor();
  std::thread stopper([&] { actor->Stop(); });
  const absl::Time begin = absl::Now();
  EXPECT_OK(actor->Run());
  EXPECT_LT(absl::Now() - begin, absl::Seconds(3));
  stopper.join();
  EXPECT_TRUE(replay_.chunks().empty());
}

// Each way to fail once, then an episode without.
TEST_F(ActorTest, AnEnvironmentThatFailsEndsItsEpisodeOnly) {
  int episode = 0;
  spoil_ = [&](int step, TimeStep& delivered) -> absl::Status {
    episode += step == 0;
    if (episode == 1 && step == 6) return absl::InternalError("broken");
    if (episode == 2 && step == 2) delivered.reward = std::nan("");
    if (episode == 3 && step == 1) delivered.observation.erase("image");
    if (episode == 4 && step == 0) delivered.observation["position"] = Array::From<float>(std::vector<float>{1}, {1});
    return absl::OkStatus();
  };
  replay_.Assign({{1, replay::v1::RANDOM, 1}, {2, replay::v1::RANDOM, 2}, {3, replay::v1::RANDOM, 3}, {4, replay::v1::RANDOM, 4},
                  {5, replay::v1::RANDOM, 5}});
  ASSERT_OK(MakeActor()->Run());
  std::map<int64_t, std::pair<int64_t, replay::v1::EpisodeEnd>> episodes;  // rows, end of the last chunk
  for (const replay::v1::Chunk& chunk : replay_.chunks()) {
    episodes[chunk.episode_id()].first += chunk.rows();
    episodes[chunk.episode_id()].second = chunk.end();
  }
  using Is = std::pair<int64_t, replay::v1::EpisodeEnd>;
  EXPECT_EQ(episodes[1], Is(6, replay::v1::TRUNCATED));
  EXPECT_EQ(episodes[2], Is(2, replay::v1::TRUNCATED));
  EXPECT_EQ(episodes[3], Is(1, replay::v1::TRUNCATED));
  EXPECT_EQ(episodes.count(4), 0u) << "it has no row; its lease runs out";
  EXPECT_EQ(episodes[5], Is(10, replay::v1::TRUNCATED));
  EXPECT_EQ(summaries_.size(), 1u) << "only whole episodes have a return";
  EXPECT_EQ(made_.size(), 5u) << "made anew after each failure";
}

TEST_F(ActorTest, GivesUpAfterFailuresInARow) {
  spoil_ = [](int step, TimeStep&) { return step == 3 ? absl::InternalError("broken") : absl::OkStatus(); };
  std::deque<FakeReplay::Assigned> script;
  for (int i = 1; i <= Actor::kMaxFailures + 3; ++i) script.push_back({i, replay::v1::RANDOM, 1});
  replay_.Assign(script);
  EXPECT_THAT(MakeActor()->Run(),
              StatusIs(absl::StatusCode::kInternal, testing::AllOf(testing::HasSubstr("'counting' failed in episode 5 after 2 decisions"),
                                                                   testing::HasSubstr("broken"))));
  EXPECT_EQ(replay_.chunks().size(), static_cast<size_t>(Actor::kMaxFailures)) << "what was played is kept";
}

TEST_F(ActorTest, PlaysTheTaskThatIsHandedOut) {
  ASSERT_OK(SetField(experiment_, "environment={action_repeat: 4 tasks {name: 'a'} tasks {name: 'b' action_repeat: 2}}"));
  replay_.Assign({{1, replay::v1::RANDOM, 1, "a"}, {2, replay::v1::TRAIN, 2, "b"}, {3, replay::v1::TRAIN, 3, "a"}});
  ASSERT_OK(MakeActor()->Run());
  ASSERT_EQ(summaries_.size(), 3u);
  EXPECT_EQ(summaries_[1].task, "b");
  EXPECT_EQ(summaries_[1].environment_steps, 9 * 2);
  EXPECT_EQ(summaries_[2].task, "a");
  EXPECT_EQ(summaries_[2].environment_steps, 9 * 4);
  // Both once to see whether they fit, then once to be played.
  EXPECT_THAT(made_, testing::ElementsAre("a 0", "b 0", "a 2", "b 2"));
}

TEST_F(ActorTest, RefusesATaskThatIsNotConfigured) {
  replay_.Assign({{1, replay::v1::RANDOM, 1, "other"}});
  EXPECT_THAT(MakeActor()->Run(), StatusIs(absl::StatusCode::kFailedPrecondition, testing::HasSubstr("'other'")));
}

TEST_F(ActorTest, CountsStepsEpisodesAndReturns) {
  replay_.Assign({{1, replay::v1::RANDOM, 1}, {2, replay::v1::EVALUATE, 2}});
  ASSERT_OK(MakeActor()->Run());
  std::map<std::string, double> values;
  for (const prometheus::MetricFamily& family : registry_->Collect()) {
    for (const prometheus::ClientMetric& metric : family.metric) {
      std::string name = family.name;
      for (const auto& label : metric.label) name += "," + label.name + "=" + label.value;
      values[name] = metric.counter.value + metric.gauge.value + static_cast<double>(metric.histogram.sample_count);
    }
  }
  EXPECT_EQ(values["orrery_actor_env_steps_total,task=counting"], 2 * 9 * 4);
  EXPECT_EQ(values["orrery_actor_episodes_total,task=counting"], 2);
  EXPECT_EQ(values["orrery_actor_episode_return,mode=random,task=counting"], 45);
  EXPECT_EQ(values["orrery_actor_episode_return,mode=evaluate,task=counting"], 45);
  EXPECT_EQ(values["orrery_actor_env_step_seconds"], 18);
  EXPECT_EQ(values["orrery_actor_action_wait_seconds"], 9);
  EXPECT_EQ(values.count("orrery_actor_unacknowledged_bytes"), 1u);
}

}  // namespace
}  // namespace orrery
