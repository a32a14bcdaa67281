#include "libs/telemetry/metrics_server.h"

#include <civetweb.h>
#include <prometheus/text_serializer.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace orrery {

// Callbacks of civetweb; they return the HTTP status of the answer they wrote.
struct MetricsHandlers {
  static int Reply(mg_connection* connection, int status, const char* reason, const char* type, const std::string& body) {
    mg_printf(connection, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n", status,
              reason, type, body.size());
    mg_write(connection, body.data(), body.size());
    return status;
  }

  static int Metrics(mg_connection* connection, void* server) {
    const auto families = static_cast<MetricsServer*>(server)->registry_->Collect();
    return Reply(connection, 200, "OK", "text/plain; version=0.0.4; charset=utf-8",
                 prometheus::TextSerializer().Serialize(families));
  }

  static int Health(mg_connection* connection, void*) { return Reply(connection, 200, "OK", "text/plain", "ok\n"); }

  static int Ready(mg_connection* connection, void* server) {
    if (static_cast<MetricsServer*>(server)->ready_) return Reply(connection, 200, "OK", "text/plain", "ready\n");
    return Reply(connection, 503, "Service Unavailable", "text/plain", "not ready\n");
  }
};

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(const std::string& listen,
                                                                    std::shared_ptr<prometheus::Registry> registry) {
  static const unsigned library = mg_init_library(0);
  (void)library;
  auto server = std::unique_ptr<MetricsServer>(new MetricsServer(std::move(registry)));
  const char* options[] = {"listening_ports",    listen.c_str(), "num_threads", "2",
                           "request_timeout_ms", "5000",         nullptr};
  mg_callbacks callbacks = {};
  callbacks.log_message = [](const mg_connection*, const char*) { return 1; };  // errors are reported below
  mg_context* context = mg_start(&callbacks, nullptr, options);
  if (context == nullptr) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on \"", listen, "\" for metrics: the address is in use or not one of this machine"));
  }
  server->context_ = context;
  mg_server_port port = {};
  if (mg_get_server_ports(context, 1, &port) > 0) server->port_ = port.port;
  mg_set_request_handler(context, "/metrics$", MetricsHandlers::Metrics, server.get());
  mg_set_request_handler(context, "/healthz$", MetricsHandlers::Health, server.get());
  mg_set_request_handler(context, "/readyz$", MetricsHandlers::Ready, server.get());
  return server;
}

MetricsServer::~MetricsServer() {
  if (context_ != nullptr) mg_stop(static_cast<mg_context*>(context_));
}

}  // namespace orrery
