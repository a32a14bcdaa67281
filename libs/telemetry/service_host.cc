#include "libs/telemetry/service_host.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/impl/server_initializer.h>

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/telemetry/call_trace.h"
#include "libs/telemetry/metrics_server.h"

namespace orrery {
namespace {
constexpr int kMaxMessageBytes = 68 << 20;
constexpr absl::Duration kLongestAge = absl::Hours(24 * 24);  // gRPC counts milliseconds in 32 bits

// Health and reflection are plugins of the whole process in gRPC: once is enough.
void EnablePlugins() {
  static const bool once = [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    return true;
  }();
  (void)once;
}

// Tells the full names of the services that a builder registered; grpc::Service itself does not say its name.
class NameCollector : public grpc::ServerBuilderPlugin {
 public:
  explicit NameCollector(std::vector<std::string>* names) : names_(names) {}
  std::string name() override { return "orrery_service_names"; }
  void InitServer(grpc::ServerInitializer*) override {}
  void Finish(grpc::ServerInitializer* server) override {
    for (const std::string& service : *server->GetServiceList()) {
      if (!absl::StartsWith(service, "grpc.")) names_->push_back(service);
    }
  }
  void ChangeArguments(const std::string&, void*) override {}

 private:
  std::vector<std::string>* const names_;
};

class CollectNames : public grpc::ServerBuilderOption {
 public:
  explicit CollectNames(std::vector<std::string>* names) : names_(names) {}
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->push_back(std::make_unique<NameCollector>(names_));
  }

 private:
  std::vector<std::string>* const names_;
};

struct Listening {
  std::unique_ptr<grpc::Server> server;
  int port = 0;
  std::vector<std::string> service_names;
};

void LimitConnections(const HostOptions& options, grpc::ServerBuilder& builder) {
  if (options.max_connection_age == absl::InfiniteDuration()) return;
  const auto milliseconds = [](absl::Duration duration) {
    return static_cast<int>(absl::ToInt64Milliseconds(std::clamp(duration, absl::Milliseconds(1), kLongestAge)));
  };
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, milliseconds(options.max_connection_age));
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, milliseconds(options.max_connection_grace));
}

absl::StatusOr<Listening> Listen(const std::string& address, const std::vector<grpc::Service*>& services,
                                 const HostOptions& options) {
  EnablePlugins();
  Listening result;
  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a second process on the same port must see an error
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);  // clients ping every 10 s
  LimitConnections(options, builder);
  builder.SetOption(std::make_unique<CollectNames>(&result.service_names));
  builder.experimental().SetInterceptorCreators(MakeCallInterceptors());
  if (!address.empty()) builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &result.port);
  for (grpc::Service* service : services) builder.RegisterService(service);
  result.server = builder.BuildAndStart();
  if (result.server == nullptr || (!address.empty() && result.port == 0)) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on \"", address, "\": the address is in use or not one of this machine"));
  }
  return result;
}

class ServiceHostImpl : public ServiceHost {
 public:
  ServiceHostImpl(Listening main, Listening health, std::unique_ptr<MetricsServer> metrics)
      : main_(std::move(main)), health_(std::move(health)), metrics_(std::move(metrics)) {
    for (grpc::Server* server : {main_.server.get(), health_.server.get()}) {
      if (server == nullptr) continue;
      server->GetHealthCheckService()->SetServingStatus("", true);
      server->GetHealthCheckService()->SetServingStatus("liveness", true);
    }
    ServiceHostImpl::SetReady(false);
  }
  ~ServiceHostImpl() override { ServiceHostImpl::Shutdown(absl::ZeroDuration()); }

  void SetReady(bool ready) override {
    for (grpc::Server* server : {main_.server.get(), health_.server.get()}) {
      if (server == nullptr) continue;
      server->GetHealthCheckService()->SetServingStatus("readiness", ready);
      for (const std::string& name : main_.service_names) server->GetHealthCheckService()->SetServingStatus(name, ready);
    }
    if (metrics_ != nullptr) metrics_->SetReady(ready);
  }

  std::shared_ptr<grpc::Channel> InProcessChannel() override {
    grpc::ChannelArguments arguments;
    arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
    arguments.SetMaxSendMessageSize(kMaxMessageBytes);
    return main_.server->InProcessChannel(arguments);
  }

  int port() const override { return main_.port; }
  int health_port() const override { return health_.port; }
  int metrics_port() const override { return metrics_ == nullptr ? 0 : metrics_->port(); }

  void Shutdown(absl::Duration grace) override {
    {
      absl::MutexLock lock(&mu_);
      if (shut_down_) return;
      shut_down_ = true;
    }
    SetReady(false);
    const auto deadline = absl::ToChronoTime(absl::Now() + grace);
    main_.server->Shutdown(deadline);
    main_.server->Wait();
    if (health_.server == nullptr) return;
    health_.server->Shutdown(deadline);
    health_.server->Wait();
  }

 private:
  const Listening main_;
  const Listening health_;
  const std::unique_ptr<MetricsServer> metrics_;
  absl::Mutex mu_;
  bool shut_down_ ABSL_GUARDED_BY(mu_) = false;
};
}  // namespace

absl::StatusOr<std::unique_ptr<ServiceHost>> ServiceHost::Start(HostOptions options) {
  std::unique_ptr<MetricsServer> metrics;
  if (!options.metrics_listen.empty()) {
    ASSIGN_OR_RETURN(metrics, MetricsServer::Start(options.metrics_listen, options.registry));
  }
  ASSIGN_OR_RETURN(Listening main, Listen(options.listen, options.services, options));
  Listening health;
  if (!options.health_listen.empty()) {
    ASSIGN_OR_RETURN(health, Listen(options.health_listen, {}, {}));
  }
  return std::make_unique<ServiceHostImpl>(std::move(main), std::move(health), std::move(metrics));
}

}  // namespace orrery
