// Servers that ask their clients to connect anew all the time: no call and no episode may fail of it.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <map>
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

// A DNS server that has the same IPv4 addresses for every name, and no others.
class NameServer {
 public:
  NameServer() : fd_(socket(AF_INET, SOCK_DGRAM, 0)) {
    address_.sin_family = AF_INET;
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address_);
    EXPECT_EQ(bind(fd_, Address(), size), 0);
    EXPECT_EQ(getsockname(fd_, Address(), &size), 0);
    thread_ = std::thread([this] { Run(); });
  }
  ~NameServer() {
    sendto(fd_, "", 0, 0, Address(), sizeof(address_));  // ends the thread
    thread_.join();
    close(fd_);
  }
  std::string Target(const std::string& name, int port) const {
    return absl::StrCat("dns://127.0.0.1:", ntohs(address_.sin_port), "/", name, ":", port);
  }
  void SetAddresses(std::vector<std::string> addresses) {
    absl::MutexLock lock(&mu_);
    addresses_ = std::move(addresses);
  }
  // Questions about `name` so far.
  int asked(const std::string& name) const {
    absl::MutexLock lock(&mu_);
    const auto found = asked_.find(name);
    return found == asked_.end() ? 0 : found->second;
  }

 private:
  sockaddr* Address() { return reinterpret_cast<sockaddr*>(&address_); }

  void Run() {
    while (true) {
      std::string question(512, '\0');
      sockaddr_in from{};
      socklen_t size = sizeof(from);
      const ssize_t bytes = recvfrom(fd_, question.data(), question.size(), 0, reinterpret_cast<sockaddr*>(&from), &size);
      if (bytes <= 0) return;
      question.resize(static_cast<size_t>(bytes));
      const std::string answer = Answer(question);
      sendto(fd_, answer.data(), answer.size(), 0, reinterpret_cast<sockaddr*>(&from), size);
    }
  }

  // RFC 1035: a header of 12 bytes, the question, and one record for each address.
  std::string Answer(const std::string& question) {
    std::string name;
    size_t end = 12;
    for (size_t length; (length = static_cast<unsigned char>(question.at(end))) > 0; end += 1 + length) {
      absl::StrAppend(&name, name.empty() ? "" : ".", question.substr(end + 1, length));
    }
    const std::string type = question.substr(end + 1, 2), kind_a("\0\1", 2);
    absl::MutexLock lock(&mu_);
    ++asked_[name];
    const std::vector<std::string> addresses = type == kind_a ? addresses_ : std::vector<std::string>();
    std::string answer = question.substr(0, 2) + std::string("\x81\x80\0\1\0", 5) + static_cast<char>(addresses.size()) +
                         std::string(4, '\0') + question.substr(12, end + 5 - 12);
    for (const std::string& address : addresses) {
      in_addr ip{};
      EXPECT_EQ(inet_pton(AF_INET, address.c_str(), &ip), 1);
      // The name of the question, type A, class IN, to be forgotten at once, four bytes.
      answer += std::string("\xc0\x0c\0\1\0\1\0\0\0\0\0\4", 12) + std::string(reinterpret_cast<const char*>(&ip), 4);
    }
    return answer;
  }

  const int fd_;
  sockaddr_in address_{};
  mutable absl::Mutex mu_;
  std::vector<std::string> addresses_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, int> asked_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

class ConnectionAgeTest : public ::testing::Test {
 protected:
  std::unique_ptr<ServiceHost> Serve(std::vector<grpc::Service*> services, absl::Duration age, absl::Duration grace,
                                     const std::string& listen = "127.0.0.1:0") {
    HostOptions options;
    options.name = "test";
    options.listen = listen;
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

// One call, without the retries of PlannerClient: nothing is to be retried.
void ExpectAnswer(planner::v1::PlannerService::Stub& stub) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
  planner::v1::ActResponse response;
  const grpc::Status status = stub.Act(&context, OneSlot(), &response);
  ASSERT_TRUE(status.ok()) << status.error_code() << " " << status.error_message();
}

TEST_F(ConnectionAgeTest, CallsOutliveTheirConnections) {
  const auto host = Serve({&planner_}, absl::Milliseconds(50), absl::Seconds(30));
  const std::shared_ptr<grpc::Channel> channel = Connect(*host);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      const auto stub = planner::v1::PlannerService::NewStub(channel);
      while (planner_.connections() < 20 && !HasFatalFailure()) ExpectAnswer(*stub);
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

// A name gets a second address, as that of a headless service does when a replica is added. The client whose connections age
// looks the name up again and calls both replicas, and no call fails on the way. The client whose connection stays does not:
// so it is the age that brings the calls. gRPC looks a name up every 30 s at most: that is how long this takes.
TEST_F(ConnectionAgeTest, ANewReplicaGetsCallsOfAnOldClient) {
  NameServer names;
  names.SetAddresses({"127.0.0.1"});
  SlowPlanner added, lasting, lasting_added;
  const absl::Duration age = absl::Milliseconds(500), grace = absl::Seconds(30), never = absl::InfiniteDuration();
  const auto host = Serve({&planner_}, age, grace), lasting_host = Serve({&lasting}, never, grace);
  ASSERT_OK_AND_ASSIGN(const auto channel, MakeChannel(names.Target("ageing.test", host->port())));
  ASSERT_OK_AND_ASSIGN(const auto lasting_channel, MakeChannel(names.Target("lasting.test", lasting_host->port())));
  const auto stub = planner::v1::PlannerService::NewStub(channel);
  const auto lasting_stub = planner::v1::PlannerService::NewStub(lasting_channel);
  ASSERT_NO_FATAL_FAILURE(ExpectAnswer(*stub));
  ASSERT_NO_FATAL_FAILURE(ExpectAnswer(*lasting_stub));
  const int asked = names.asked("ageing.test"), lasting_asked = names.asked("lasting.test");
  ASSERT_GT(asked, 0);
  ASSERT_GT(lasting_asked, 0);

  const auto added_host = Serve({&added}, age, grace, absl::StrCat("127.0.0.2:", host->port()));
  const auto lasting_added_host = Serve({&lasting_added}, never, grace, absl::StrCat("127.0.0.2:", lasting_host->port()));
  names.SetAddresses({"127.0.0.1", "127.0.0.2"});
  const absl::Time deadline = absl::Now() + absl::Seconds(120);
  while (added.connections() == 0) {
    ASSERT_LT(absl::Now(), deadline) << "asked " << names.asked("ageing.test") - asked << " times for the name again";
    ASSERT_NO_FATAL_FAILURE(ExpectAnswer(*stub));
    ASSERT_NO_FATAL_FAILURE(ExpectAnswer(*lasting_stub));
  }
  // From now on both are called.
  const size_t first = planner_.connections();
  while (added.connections() < 3 || planner_.connections() < first + 3) {
    ASSERT_LT(absl::Now(), deadline);
    ASSERT_NO_FATAL_FAILURE(ExpectAnswer(*stub));
  }
  EXPECT_EQ(lasting.connections(), 1u);
  EXPECT_EQ(lasting_added.connections(), 0u);
  EXPECT_EQ(names.asked("lasting.test"), lasting_asked);
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
