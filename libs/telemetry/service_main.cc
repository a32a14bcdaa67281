#include "libs/telemetry/service_main.h"

#include <civetweb.h>
#include <grpcpp/generic/generic_stub.h>
#include <unistd.h>

#include <algorithm>
#include <iostream>
#include <optional>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/host_port.h"
#include "libs/base/log.h"
#include "libs/base/shutdown.h"
#include "libs/base/status.h"

namespace orrery {
namespace {
constexpr absl::Duration kHealthPatience = absl::Seconds(3);

void AddAddress(CLI::App& app, const std::string& flag, int port, const std::string& what, std::string& value) {
  if (port == 0) return;
  value = absl::StrCat("127.0.0.1:", port);
  app.add_option(flag, value, what + "; port 0: any free one")->capture_default_str()->type_name("HOST:PORT");
}

constexpr double kLongestSeconds = 2'000'000;  // 23 days

void AddConnectionFlags(CLI::App& app, CommonFlags& flags) {
  app.add_option("--max_connection_age", flags.max_connection_age,
                 "Seconds after which clients are asked to connect anew, so that new replicas get their share; 0: never")
      ->check(CLI::Range(0.0, kLongestSeconds))
      ->capture_default_str();
  app.add_option("--max_connection_grace", flags.max_connection_grace,
                 "Seconds that calls may go on after that; longer ones, such as streams, are cut and begun again")
      ->check(CLI::Range(0.001, kLongestSeconds))
      ->capture_default_str();
}

// One line, as the exit codes promise: messages of third parties may hold line breaks.
void PrintError(const std::string& program, std::string message) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::cerr << program << ": error: " << message << std::endl;
}

// Where to reach, from the same machine, what listens on `listen`.
absl::StatusOr<HostPort> ReachableAt(const std::string& listen) {
  std::optional<HostPort> endpoint = ParseHostPort(listen);
  if (!endpoint.has_value() || endpoint->port == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--healthcheck cannot ask \"", listen, "\": expected HOST:PORT with a port of 1 to 65535"));
  }
  if (endpoint->host.empty() || endpoint->host == "0.0.0.0" || endpoint->host == "::") endpoint->host = "127.0.0.1";
  return *std::move(endpoint);
}

// grpc.health.v1.Health.Check and its messages (one string; one enum) by hand: no generated code is installed for them.
absl::Status AskHealthService(const HostPort& endpoint) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  grpc::GenericStub stub(grpc::CreateCustomChannel(endpoint.text(), grpc::InsecureChannelCredentials(), arguments));
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + kHealthPatience));
  const grpc::Slice question("\x0a\x09readiness");
  const grpc::ByteBuffer request(&question, 1);
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  grpc::ByteBuffer response;
  grpc::Status status;
  call->StartCall();
  call->Finish(&response, &status, &queue);
  void* tag;
  bool ok;
  queue.Next(&tag, &ok);  // at the deadline at the latest
  if (!status.ok()) {
    return absl::UnavailableError(
        absl::StrCat("the health service at ", endpoint.text(), " does not answer: ", status.error_message()));
  }
  std::vector<grpc::Slice> parts;
  std::string answer;
  if (response.Dump(&parts).ok()) {
    for (const grpc::Slice& part : parts) answer.append(reinterpret_cast<const char*>(part.begin()), part.size());
  }
  if (answer == "\x08\x01") return absl::OkStatus();  // status: SERVING
  return absl::UnavailableError(absl::StrCat("not ready, says the health service at ", endpoint.text()));
}

absl::Status AskMetricsServer(const HostPort& endpoint) {
  static const unsigned library = mg_init_library(0);
  (void)library;
  char error[256] = "";
  mg_connection* connection = mg_connect_client(endpoint.host.c_str(), endpoint.port, 0, error, sizeof(error));
  if (connection == nullptr) return absl::UnavailableError(absl::StrCat("cannot reach ", endpoint.text(), ": ", error));
  mg_printf(connection, "GET /readyz HTTP/1.0\r\n\r\n");
  const int timeout_ms = static_cast<int>(absl::ToInt64Milliseconds(kHealthPatience));
  const int code = mg_get_response(connection, error, sizeof(error), timeout_ms) < 0
                       ? 0
                       : mg_get_response_info(connection)->status_code;
  mg_close_connection(connection);
  if (code == 200) return absl::OkStatus();
  if (code == 0) return absl::UnavailableError(absl::StrCat(endpoint.text(), " does not answer: ", error));
  return absl::UnavailableError(absl::StrCat("not ready: ", endpoint.text(), "/readyz answers ", code, ", expected 200"));
}

int ReportReadiness(const std::string& program, const CommonFlags& flags) {
  const absl::StatusOr<std::string> address = AskReadiness(flags);
  if (!address.ok()) {
    PrintError(program, std::string(address.status().message()));
    return 1;
  }
  std::cout << program << ": ready at " << *address << std::endl;
  return 0;
}
}  // namespace

void AddCommonFlags(CLI::App& app, const ServiceDefaults& defaults, CommonFlags& flags) {
  AddAddress(app, "--listen", defaults.port, "Address of the gRPC service", flags.listen);
  AddAddress(app, "--health_listen", defaults.health_port, "Address of the plaintext health service", flags.health_listen);
  AddAddress(app, "--metrics_listen", defaults.metrics_port, "Address of HTTP /metrics, /healthz and /readyz",
             flags.metrics_listen);
  if (defaults.port != 0) AddConnectionFlags(app, flags);
  app.add_option("--config", flags.config, "Experiment (text proto)")->type_name("FILE");
  app.add_option("--set", flags.set, "Sets one field of the experiment; may be repeated")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  app.add_option("--log_level", flags.log_level, "debug, info, warning, error or off")->capture_default_str();
  // Runs before CLI11 looks for what is required.
  const auto ask_only = [&app, &flags] {
    flags.healthcheck = true;
    for (CLI::Option* option : app.get_options()) option->required(false);
  };
  app.add_flag_callback("--healthcheck", ask_only,
                        "Starts nothing: exits 0 when the service started with the same flags is ready, else 1");
}

int RunProgram(int argc, const char* const* argv, CLI::App& app, const std::string& program, const CommonFlags& flags,
               const std::function<absl::Status()>& body) {
  BlockShutdownSignals();
  app.name(program);
  app.set_version_flag("--version", absl::StrCat(program, " ", kVersion));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    PrintError(program, error.what());
    return 2;
  }
  if (flags.healthcheck) return ReportReadiness(program, flags);
  if (absl::Status status = InitLogging(program, flags.log_level); !status.ok()) {
    PrintError(program, std::string(status.message()));
    return 2;
  }
  if (absl::Status status = body(); !status.ok()) {
    PrintError(program, std::string(status.message()));
    return 1;
  }
  return 0;
}

absl::StatusOr<std::string> AskReadiness(const CommonFlags& flags) {
  for (const std::string& listen : {flags.health_listen, flags.listen}) {
    if (listen.empty()) continue;
    ASSIGN_OR_RETURN(const HostPort endpoint, ReachableAt(listen));
    RETURN_IF_ERROR(AskHealthService(endpoint));
    return endpoint.text();
  }
  if (flags.metrics_listen.empty()) {
    return absl::InvalidArgumentError("--healthcheck needs an address to ask: --health_listen, --listen or --metrics_listen");
  }
  ASSIGN_OR_RETURN(const HostPort endpoint, ReachableAt(flags.metrics_listen));
  RETURN_IF_ERROR(AskMetricsServer(endpoint));
  return endpoint.text();
}

std::string MakeProcessId(const std::string& role) {
  char host[65] = "";
  gethostname(host, sizeof(host) - 1);
  return absl::StrCat(role, "-", host, "-", getpid(), "-", absl::Hex(std::random_device{}()));
}

HostOptions MakeHostOptions(const ServiceDefaults& defaults, const CommonFlags& flags) {
  HostOptions options;
  options.name = defaults.name;
  options.listen = flags.listen;
  options.health_listen = flags.health_listen;
  options.metrics_listen = flags.metrics_listen;
  if (flags.max_connection_age > 0) options.max_connection_age = absl::Seconds(flags.max_connection_age);
  options.max_connection_grace = absl::Seconds(flags.max_connection_grace);
  options.registry = std::make_shared<prometheus::Registry>();
  return options;
}

void AwaitShutdown(ServiceHost& host, const std::string& name, const std::function<void()>& drain) {
  LogInfo("{} serving port={} health_port={} metrics_port={}", name, host.port(), host.health_port(), host.metrics_port());
  const int signal_number = WaitForShutdownSignal();
  LogInfo("{} draining signal={}", name, signal_number);
  host.SetReady(false);
  drain();
  host.Shutdown(absl::Seconds(10));
  LogInfo("{} stopped", name);
}

}  // namespace orrery
