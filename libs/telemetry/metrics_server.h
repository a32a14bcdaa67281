// HTTP for scrapers and probes: /metrics (Prometheus text), /healthz (200 while the process works), /readyz (200 or 503).
#pragma once

#include <prometheus/registry.h>

#include <atomic>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace orrery {

// Thread-safe. Serves from its own threads until destroyed.
class MetricsServer {
 public:
  // UNAVAILABLE names the address ("HOST:PORT", port 0 for any free one) that could not be bound.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(const std::string& listen,
                                                              std::shared_ptr<prometheus::Registry> registry);
  ~MetricsServer();
  MetricsServer(const MetricsServer&) = delete;
  MetricsServer& operator=(const MetricsServer&) = delete;

  void SetReady(bool ready) { ready_ = ready; }
  int port() const { return port_; }

 private:
  friend struct MetricsHandlers;
  explicit MetricsServer(std::shared_ptr<prometheus::Registry> registry) : registry_(std::move(registry)) {}

  const std::shared_ptr<prometheus::Registry> registry_;
  std::atomic<bool> ready_ = false;
  int port_ = 0;
  void* context_ = nullptr;  // civetweb's mg_context
};

}  // namespace orrery
