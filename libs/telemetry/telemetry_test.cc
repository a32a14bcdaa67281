#include <arpa/inet.h>
#include <civetweb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/impl/client_unary_call.h"
#include "libs/base/status_matchers.h"
#include "libs/telemetry/metrics.h"
#include "libs/telemetry/service_host.h"
#include "libs/telemetry/service_main.h"
#include "orrery/replay/v1/replay.grpc.pb.h"

namespace orrery {
namespace {
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr char kReplayService[] = "orrery.replay.v1.ReplayService";

// grpc.health.v1.Health.Check and its messages (one string; one varint), by hand: no generated code is installed for them.
enum HealthAnswer { kUnknownService = -1, kServing = 1, kNotServing = 2 };

class RawCall {
 public:
  explicit RawCall(const std::shared_ptr<grpc::Channel>& channel) : channel_(channel) {}
  grpc::Status Call(const std::string& method, const std::string& request, std::string* response) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
    grpc::Slice slice(request);
    const grpc::ByteBuffer request_buffer(&slice, 1);
    grpc::ByteBuffer response_buffer;
    const grpc::internal::RpcMethod rpc(method.c_str(), grpc::internal::RpcMethod::NORMAL_RPC, channel_);
    const grpc::Status status =
        grpc::internal::BlockingUnaryCall<grpc::ByteBuffer, grpc::ByteBuffer>(channel_.get(), rpc, &context, request_buffer,
                                                                              &response_buffer);
    std::vector<grpc::Slice> slices;
    if (status.ok() && response_buffer.Dump(&slices).ok()) {
      for (const grpc::Slice& part : slices) response->append(reinterpret_cast<const char*>(part.begin()), part.size());
    }
    return status;
  }

 private:
  const std::shared_ptr<grpc::Channel> channel_;
};

HealthAnswer CheckHealth(const std::shared_ptr<grpc::Channel>& channel, const std::string& service) {
  std::string request;
  if (!service.empty()) request = absl::StrCat("\x0a", std::string(1, static_cast<char>(service.size())), service);
  std::string response;
  const grpc::Status status = RawCall(channel).Call("/grpc.health.v1.Health/Check", request, &response);
  if (!status.ok()) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND) << status.error_message();
    return kUnknownService;
  }
  EXPECT_EQ(response.size(), 2u);
  return response.size() == 2 ? static_cast<HealthAnswer>(response[1]) : kUnknownService;
}

std::string HttpGet(int port, const std::string& path) {
  char error[256] = "";
  mg_connection* connection = mg_download("127.0.0.1", port, 0, error, sizeof(error), "GET %s HTTP/1.0\r\n\r\n", path.c_str());
  if (connection == nullptr) return absl::StrCat("failed: ", error);
  std::string result = absl::StrCat(mg_get_response_info(connection)->status_code, " ");
  char buffer[4096];
  for (int n; (n = mg_read(connection, buffer, sizeof(buffer))) > 0;) result.append(buffer, n);
  mg_close_connection(connection);
  return result;
}

class EchoReplay : public replay::v1::ReplayService::Service {
 public:
  grpc::Status GetStats(grpc::ServerContext*, const replay::v1::GetStatsRequest* request,
                        replay::v1::GetStatsResponse* response) override {
    response->set_rows(static_cast<int64_t>(request->run().size()));
    return grpc::Status::OK;
  }
};

HostOptions LoopbackOptions(grpc::Service* service) {
  HostOptions options;
  options.name = "replay";
  options.listen = options.health_listen = options.metrics_listen = "127.0.0.1:0";
  options.registry = std::make_shared<prometheus::Registry>();
  options.services = {service};
  return options;
}

TEST(Metrics, SameNameAndLabelsAreOneMetric) {
  prometheus::Registry registry;
  AddCounter(registry, "things_total", "Things.", {{"kind", "a"}}).Increment(2);
  AddCounter(registry, "things_total", "Things.", {{"kind", "a"}}).Increment();
  AddCounter(registry, "things_total", "Things.", {{"kind", "b"}}).Increment();
  EXPECT_EQ(AddCounter(registry, "things_total", "Things.", {{"kind", "a"}}).Value(), 3);
  ASSERT_EQ(registry.Collect().size(), 1u);
  EXPECT_EQ(registry.Collect()[0].name, "orrery_things_total");
  EXPECT_EQ(registry.Collect()[0].metric.size(), 2u);
}

TEST(Metrics, BucketsRise) {
  for (const auto& buckets : {SecondsBuckets(), SizeBuckets()}) {
    EXPECT_TRUE(std::is_sorted(buckets.begin(), buckets.end()));
  }
  EXPECT_EQ(SecondsBuckets().front(), 1e-4);
  EXPECT_EQ(SecondsBuckets().back(), 60);
  EXPECT_EQ(SizeBuckets().back(), 1024);
}

TEST(ServiceHost, ServesMetricsOverHttp) {
  EchoReplay service;
  HostOptions options = LoopbackOptions(&service);
  AddGauge(*options.registry, "replay_steps", "Rows stored.").Set(42);
  AddHistogram(*options.registry, "replay_append_seconds", "Time.", SecondsBuckets()).Observe(0.01);
  ASSERT_OK_AND_ASSIGN(auto host, ServiceHost::Start(options));
  const std::string page = HttpGet(host->metrics_port(), "/metrics");
  EXPECT_THAT(page, HasSubstr("200 "));
  EXPECT_THAT(page, HasSubstr("orrery_replay_steps 42"));
  EXPECT_THAT(page, HasSubstr("orrery_replay_append_seconds_count 1"));
  EXPECT_THAT(HttpGet(host->metrics_port(), "/healthz"), HasSubstr("200 ok"));
  EXPECT_THAT(HttpGet(host->metrics_port(), "/readyz"), HasSubstr("503 "));
  host->SetReady(true);
  EXPECT_THAT(HttpGet(host->metrics_port(), "/readyz"), HasSubstr("200 ready"));
  EXPECT_THAT(HttpGet(host->metrics_port(), "/else"), HasSubstr("404 "));
}

TEST(ServiceHost, TellsLivenessAndReadinessByName) {
  EchoReplay service;
  ASSERT_OK_AND_ASSIGN(auto host, ServiceHost::Start(LoopbackOptions(&service)));
  for (int port : {host->port(), host->health_port()}) {
    auto channel = grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials());
    host->SetReady(false);
    EXPECT_EQ(CheckHealth(channel, ""), kServing);
    EXPECT_EQ(CheckHealth(channel, "liveness"), kServing);
    EXPECT_EQ(CheckHealth(channel, "readiness"), kNotServing);
    EXPECT_EQ(CheckHealth(channel, kReplayService), kNotServing);
    EXPECT_EQ(CheckHealth(channel, "another"), kUnknownService);
    host->SetReady(true);
    EXPECT_EQ(CheckHealth(channel, "readiness"), kServing);
    EXPECT_EQ(CheckHealth(channel, kReplayService), kServing);
  }
}

TEST(ServiceHost, ReflectionListsTheServices) {
  EchoReplay service;
  ASSERT_OK_AND_ASSIGN(auto host, ServiceHost::Start(LoopbackOptions(&service)));
  auto channel = grpc::CreateChannel(absl::StrCat("127.0.0.1:", host->port()), grpc::InsecureChannelCredentials());
  std::string response;
  // ServerReflectionRequest{list_services: "*"}; a single message on the stream.
  const grpc::Status status = RawCall(channel).Call("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                                                    std::string("\x3a\x01*"), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_THAT(response, HasSubstr(kReplayService));
}

TEST(ServiceHost, AnswersInProcessWithoutAnyPort) {
  EchoReplay service;
  HostOptions options;
  options.name = "replay";
  options.registry = std::make_shared<prometheus::Registry>();
  options.services = {&service};
  ASSERT_OK_AND_ASSIGN(auto host, ServiceHost::Start(options));
  EXPECT_EQ(host->port(), 0);
  EXPECT_EQ(host->health_port(), 0);
  EXPECT_EQ(host->metrics_port(), 0);
  auto stub = replay::v1::ReplayService::NewStub(host->InProcessChannel());
  grpc::ClientContext context;
  replay::v1::GetStatsRequest request;
  request.set_run(std::string(5 << 20, 'x'));  // above gRPC's own limit of 4 MiB
  replay::v1::GetStatsResponse response;
  const grpc::Status status = stub->GetStats(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.rows(), 5 << 20);
}

TEST(ServiceHost, NamesTheAddressThatIsTaken) {
  EchoReplay service;
  ASSERT_OK_AND_ASSIGN(auto first, ServiceHost::Start(LoopbackOptions(&service)));
  for (std::string HostOptions::*address : {&HostOptions::listen, &HostOptions::health_listen, &HostOptions::metrics_listen}) {
    EchoReplay other;
    HostOptions options = LoopbackOptions(&other);
    const int port = address == &HostOptions::metrics_listen ? first->metrics_port() : first->port();
    options.*address = absl::StrCat("127.0.0.1:", port);
    EXPECT_THAT(ServiceHost::Start(options), StatusIs(absl::StatusCode::kUnavailable, HasSubstr(options.*address)));
  }
}

int RunWith(const std::vector<std::string>& arguments, const absl::Status& result, std::string* printed_error,
            const ServiceDefaults& defaults = {"replay", 7101, 7201, 9101}, bool config_required = false) {
  CommonFlags flags;
  CLI::App app("Test.");
  AddCommonFlags(app, defaults, flags);
  app.get_option("--config")->required(config_required);
  std::vector<const char*> argv = {"orrery-replay"};
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  testing::internal::CaptureStderr();
  testing::internal::CaptureStdout();
  const int code =
      RunProgram(static_cast<int>(argv.size()), argv.data(), app, "orrery-replay", flags, [&] { return result; });
  *printed_error = testing::internal::GetCapturedStderr();
  *printed_error += testing::internal::GetCapturedStdout();
  return code;
}

TEST(MakeProcessId, NamesRoleAndProcessAndDiffersEveryTime) {
  const std::string id = MakeProcessId("learner");
  EXPECT_THAT(id, AllOf(StartsWith("learner-"), HasSubstr(absl::StrCat("-", getpid(), "-"))));
  EXPECT_NE(MakeProcessId("learner"), id);
}

TEST(RunProgram, ExitCodesAndMessages) {
  std::string printed;
  EXPECT_EQ(RunWith({}, absl::OkStatus(), &printed), 0);
  EXPECT_EQ(RunWith({"--version"}, absl::InternalError("not run"), &printed), 0);
  EXPECT_EQ(printed, "orrery-replay 0.1.0\n");
  EXPECT_EQ(RunWith({"--help"}, absl::InternalError("not run"), &printed), 0);
  EXPECT_THAT(printed, HasSubstr("127.0.0.1:7101"));
  EXPECT_EQ(RunWith({}, absl::UnavailableError("no store\nat all"), &printed), 1);
  EXPECT_EQ(printed, "orrery-replay: error: no store at all\n");
  EXPECT_EQ(RunWith({"--nonsense"}, absl::OkStatus(), &printed), 2);
  EXPECT_THAT(printed, HasSubstr("orrery-replay: error: "));
  EXPECT_EQ(RunWith({"--log_level=loud"}, absl::OkStatus(), &printed), 2);
  EXPECT_THAT(printed, HasSubstr("loud"));
}

// The exit code of --healthcheck with `arguments`; the service itself must not be started.
int RunHealthCheck(std::vector<std::string> arguments, std::string* printed,
                const ServiceDefaults& defaults = {"replay", 7101, 7201, 9101}) {
  arguments.push_back("--healthcheck");
  return RunWith(arguments, absl::InternalError("started"), printed, defaults, /*config_required=*/true);
}

TEST(HealthCheck, FollowsReadiness) {
  EchoReplay service;
  ASSERT_OK_AND_ASSIGN(auto host, ServiceHost::Start(LoopbackOptions(&service)));
  const std::string address = absl::StrCat("127.0.0.1:", host->health_port());
  for (const char* name : {"127.0.0.1:", "0.0.0.0:", "[::]:", "localhost:"}) {
    const std::string listen = absl::StrCat(name, host->health_port());
    std::string printed;
    host->SetReady(false);
    EXPECT_EQ(RunHealthCheck({"--health_listen=" + listen}, &printed), 1) << listen;
    EXPECT_THAT(printed, HasSubstr("orrery-replay: error: not ready, says the health service at ")) << listen;
    host->SetReady(true);
    EXPECT_EQ(RunHealthCheck({"--health_listen=" + listen}, &printed), 0) << printed;
    EXPECT_THAT(printed, HasSubstr(absl::StrCat(":", host->health_port(), "\n")));
  }
  std::string printed;
  EXPECT_EQ(RunHealthCheck({"--health_listen=" + address, "--log_level=off"}, &printed), 0);
  EXPECT_EQ(printed, absl::StrCat("orrery-replay: ready at ", address, "\n"));
  host.reset();
  EXPECT_EQ(RunHealthCheck({"--health_listen=" + address}, &printed), 1);
  EXPECT_THAT(printed, HasSubstr(absl::StrCat("the health service at ", address, " does not answer")));
  EXPECT_EQ(std::count(printed.begin(), printed.end(), '\n'), 1) << printed;
}

TEST(HealthCheck, AsksTheNextAddressWhereOneIsEmpty) {
  EchoReplay service;
  ASSERT_OK_AND_ASSIGN(auto host, ServiceHost::Start(LoopbackOptions(&service)));
  host->SetReady(true);
  std::string printed;
  const std::string listen = absl::StrCat("--listen=127.0.0.1:", host->port());
  EXPECT_EQ(RunHealthCheck({"--health_listen", "", listen}, &printed), 0) << printed;
  EXPECT_THAT(printed, HasSubstr(absl::StrCat("ready at 127.0.0.1:", host->port())));
  const std::string metrics = absl::StrCat("--metrics_listen=127.0.0.1:", host->metrics_port());
  EXPECT_EQ(RunHealthCheck({"--health_listen", "", "--listen", "", metrics}, &printed), 0) << printed;
  EXPECT_THAT(printed, HasSubstr(absl::StrCat("ready at 127.0.0.1:", host->metrics_port())));
  EXPECT_EQ(RunHealthCheck({"--health_listen", "", "--listen", "", "--metrics_listen", ""}, &printed), 1);
  EXPECT_THAT(printed, HasSubstr("needs an address"));
}

TEST(HealthCheck, AsksAServiceWithoutGrpcOverHttp) {
  const ServiceDefaults actor{"actor", 0, 0, 9104};
  EchoReplay service;
  ASSERT_OK_AND_ASSIGN(auto host, ServiceHost::Start(LoopbackOptions(&service)));
  const int port = host->metrics_port();
  for (const std::string& listen : {absl::StrCat("127.0.0.1:", port), absl::StrCat("0.0.0.0:", port), absl::StrCat(port)}) {
    std::string printed;
    host->SetReady(false);
    EXPECT_EQ(RunHealthCheck({"--metrics_listen=" + listen}, &printed, actor), 1) << listen;
    EXPECT_THAT(printed, HasSubstr(absl::StrCat("not ready: 127.0.0.1:", port, "/readyz answers 503, expected 200\n")));
    host->SetReady(true);
    EXPECT_EQ(RunHealthCheck({"--metrics_listen=" + listen}, &printed, actor), 0) << printed;
  }
  host.reset();
  std::string printed;
  EXPECT_EQ(RunHealthCheck({absl::StrCat("--metrics_listen=127.0.0.1:", port)}, &printed, actor), 1);
  EXPECT_THAT(printed, HasSubstr(absl::StrCat("127.0.0.1:", port)));
}

TEST(HealthCheck, RefusesAnAddressThatCannotBeAsked) {
  for (const char* listen : {"127.0.0.1:0", "127.0.0.1:70000", "127.0.0.1:", "unix:/tmp/socket"}) {
    std::string printed;
    EXPECT_EQ(RunHealthCheck({absl::StrCat("--health_listen=", listen)}, &printed), 1) << listen;
    EXPECT_THAT(printed, HasSubstr(absl::StrCat("cannot ask \"", listen, "\""))) << listen;
  }
}

TEST(HealthCheck, GivesUpOnAServerThatNeverAnswers) {
  // Accepts connections, as the kernel does for any listening socket, and says nothing.
  const int silent = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  ASSERT_EQ(bind(silent, reinterpret_cast<sockaddr*>(&address), size), 0);
  ASSERT_EQ(listen(silent, 8), 0);
  ASSERT_EQ(getsockname(silent, reinterpret_cast<sockaddr*>(&address), &size), 0);
  const std::string where = absl::StrCat("127.0.0.1:", ntohs(address.sin_port));
  std::string printed;
  EXPECT_EQ(RunHealthCheck({"--health_listen=" + where}, &printed), 1);
  EXPECT_THAT(printed, HasSubstr(where + " does not answer"));
  EXPECT_EQ(RunHealthCheck({"--metrics_listen=" + where}, &printed, {"actor", 0, 0, 9104}), 1);
  EXPECT_THAT(printed, HasSubstr(where + " does not answer"));
  close(silent);
}

TEST(MakeHostOptions, ConnectionsAgeAsTheFlagsSay) {
  const ServiceDefaults service{"replay", 7101, 7201, 9101};
  const auto read = [&service](std::vector<const char*> arguments) {
    CommonFlags flags;
    CLI::App app("Test.");
    AddCommonFlags(app, service, flags);
    arguments.insert(arguments.begin(), "orrery-replay");
    EXPECT_EQ(RunProgram(static_cast<int>(arguments.size()), arguments.data(), app, "orrery-replay", flags,
                         [] { return absl::OkStatus(); }),
              0);
    return MakeHostOptions(service, flags);
  };
  EXPECT_EQ(read({}).max_connection_age, absl::Minutes(5));
  EXPECT_EQ(read({}).max_connection_grace, absl::Minutes(2));
  EXPECT_EQ(read({"--max_connection_age=0.5"}).max_connection_age, absl::Milliseconds(500));
  EXPECT_EQ(read({"--max_connection_age=0"}).max_connection_age, absl::InfiniteDuration());
  EXPECT_EQ(read({"--max_connection_grace=7"}).max_connection_grace, absl::Seconds(7));
  std::string printed;
  EXPECT_EQ(RunWith({"--max_connection_age=-1"}, absl::OkStatus(), &printed), 2);
}

TEST(RunProgram, ReadsRepeatedSettings) {
  CommonFlags flags;
  CLI::App app("Test.");
  AddCommonFlags(app, {"actor", 0, 0, 9104}, flags);
  const char* arguments[] = {"orrery-actor", "--set", "seed=1", "--set=name=x", "--metrics_listen=127.0.0.1:0"};
  EXPECT_EQ(RunProgram(5, arguments, app, "orrery-actor", flags, [] { return absl::OkStatus(); }), 0);
  EXPECT_EQ(flags.set, (std::vector<std::string>{"seed=1", "name=x"}));
  EXPECT_EQ(flags.listen, "");
  EXPECT_EQ(flags.metrics_listen, "127.0.0.1:0");
}

}  // namespace
}  // namespace orrery
