// Servers that ask their clients to connect anew all the time: no call and no episode may fail of it.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/status_matchers.h"
#include "libs/client/channel.h"
#include "libs/client/planner_client.h"
#include "libs/client/replay_client.h"
#include "libs/config/config.h"
#include "libs/replay/store.h"
#include "libs/telemetry/service_host.h"
#include "services/actor/actor.h"
#include "services/replay/replay_service_impl.h"

namespace orrery {
namespace {

// Answers after a few milliseconds, and remembers the connections that asked.
class SlowPlanner : public planner::v1::PlannerService::Service {
 public:
  grpc::Status Act(grpc::ServerContext* context, const planner::v1::ActRequest* request,
                   planner::v1::ActResponse* response) override {
    {
      absl::MutexLock lock(&mu_);
      connections_.insert(context->peer());
    }
    absl::SleepFor(absl::Milliseconds(5));
    for (int i = 0; i < request->slots_size(); ++i) {
      planner::v1::SlotResult& result = *response->add_results();
      for (const float value : {0.25f, -0.5f}) result.add_action(value);
      result.set_belief("belief");
    }
    response->mutable_snapshot_version()->set_generation(1);
    return grpc::Status::OK;
  }
  size_t connections() const {
    absl::MutexLock lock(&mu_);
    return connections_.size();
  }

 private:
  mutable absl::Mutex mu_;
  std::set<std::string> connections_ ABSL_GUARDED_BY(mu_);
};

class ConnectionAgeTest : public ::testing::Test {
 protected:
  std::unique_ptr<ServiceHost> Serve(std::vector<grpc::Service*> services, absl::Duration age, absl::Duration grace) {
    HostOptions options;
    options.name = "test";
    options.listen = "127.0.0.1:0";
    options.registry = std::make_shared<prometheus::Registry>();
    options.services = std::move(services);
    options.max_connection_age = age;
    options.max_connection_grace = grace;
    auto host = ServiceHost::Start(std::move(options));
    EXPECT_OK(host);
    (*host)->SetReady(true);
    return *std::move(host);
  }
  static std::shared_ptr<grpc::Channel> Connect(const ServiceHost& host) {
    auto channel = MakeChannel(absl::StrCat("127.0.0.1:", host.port()));
    EXPECT_OK(channel);
    return *std::move(channel);
  }

  SlowPlanner planner_;
};

planner::v1::ActRequest OneSlot() {
  planner::v1::ActRequest request;
  request.set_client_id("test");
  request.add_slots();
  return request;
}

TEST_F(ConnectionAgeTest, CallsOutliveTheirConnections) {
  const auto host = Serve({&planner_}, absl::Milliseconds(50), absl::Seconds(30));
  const std::shared_ptr<grpc::Channel> channel = Connect(*host);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      // Without the retries of PlannerClient: nothing is to be retried.
      const auto stub = planner::v1::PlannerService::NewStub(channel);
      while (planner_.connections() < 20) {
        grpc::ClientContext context;
        context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
        planner::v1::ActResponse response;
        const grpc::Status status = stub->Act(&context, OneSlot(), &response);
        ASSERT_TRUE(status.ok()) << status.error_code() << " " << status.error_message();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(ConnectionAgeTest, WithoutALimitOneConnectionServes) {
  const auto host = Serve({&planner_}, absl::InfiniteDuration(), absl::Seconds(30));
  PlannerClient client(Connect(*host));
  for (int i = 0; i < 50; ++i) EXPECT_OK(client.Act(OneSlot(), absl::Now() + absl::Seconds(60)));
  EXPECT_EQ(planner_.connections(), 1u);
}

// A server ends a connection at the third ping that it finds too early; clients ping every 10 s, also without a call.
TEST_F(ConnectionAgeTest, AnIdleClientMayPing) {
  const auto host = Serve({&planner_}, absl::InfiniteDuration(), absl::Seconds(30));
  PlannerClient client(Connect(*host));
  EXPECT_OK(client.Act(OneSlot(), absl::Now() + absl::Seconds(60)));
  absl::SleepFor(absl::Seconds(55));
  EXPECT_OK(client.Act(OneSlot(), absl::Now() + absl::Seconds(60)));
  EXPECT_EQ(planner_.connections(), 1u);
}

// The grace is as short as the age: streams of chunks are cut in the middle.
TEST_F(ConnectionAgeTest, AnActorPlaysEveryEpisodeToItsEnd) {
  constexpr int kEpisodes = 12, kDecisions = 40;
  auto experiment = ParseExperiment(R"pb(
    name: "ages"
    environment { task: "point_pixels" image_size: 32 time_limit: 40 }
    collection { seed_episodes: 1 environments: 2 }
    evaluation { every_episodes: 4 }
    learning { schedule: CONCURRENT sequence_length: 10 max_episodes: 12 }
    replay { chunk_rows: 4 limiter { updates_per_row: 0.001 tolerance: 50 } }
  )pb");
  ASSERT_OK(experiment);
  ASSERT_OK_AND_ASSIGN(const auto store, OpenStore({.location = "memory:", .run = "ages"}));
  const auto registry = std::make_shared<prometheus::Registry>();
  ASSERT_OK_AND_ASSIGN(const auto replay, ReplayServer::Create({*experiment, store.get(), registry}));
  const auto host = Serve({replay->service(), &planner_}, absl::Milliseconds(100), absl::Milliseconds(100));
  replay->Start([](bool) {});

  ActorOptions options;
  options.experiment = *experiment;
  options.actor_id = "actor";
  options.replay = options.planner = Connect(*host);
  options.registry = registry;
  std::vector<EpisodeSummary> played;
  options.on_episode = [&played](const EpisodeSummary& episode) { played.push_back(episode); };
  ASSERT_OK_AND_ASSIGN(const auto actor, Actor::Create(std::move(options)));
  EXPECT_OK(actor->Run());
  EXPECT_GE(planner_.connections(), 5u);

  int64_t rows = 0;
  for (const EpisodeSummary& episode : played) {
    EXPECT_EQ(episode.rows, kDecisions + 1) << "episode " << episode.episode_id;
    if (episode.mode != EpisodeMode::kEvaluate) rows += episode.rows;
  }
  EXPECT_GE(played.size(), static_cast<size_t>(kEpisodes));
  ReplayClient client(Connect(*host), "ages");
  ASSERT_OK_AND_ASSIGN(const auto stats, client.GetStats(absl::Now() + absl::Seconds(30)));
  EXPECT_EQ(stats.rows_appended(), rows) << "each row of training once";
  replay->Shutdown();
  host->Shutdown(absl::Seconds(1));
}

}  // namespace
}  // namespace orrery
