// What every service process has: a gRPC server with health and reflection, a plaintext health port, `/metrics`, and a
// graceful end. `orrery train` uses the same class without ports, over in-process channels.
#pragma once

#include <grpcpp/grpcpp.h>
#include <prometheus/registry.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace orrery {

struct HostOptions {
  std::string name;            // "replay", "learner", "planner", "actor"
  std::string listen;          // "127.0.0.1:7101"; port 0: any free one; empty: in-process only
  std::string health_listen;   // plaintext health; empty: none
  std::string metrics_listen;  // HTTP /metrics and /healthz; empty: none
  std::shared_ptr<prometheus::Registry> registry;
  std::vector<grpc::Service*> services;  // not owned; must outlive the host
  // A connection to `listen` that is about so old (±10 %) is asked to end: its client connects anew, perhaps to another
  // replica, and running calls may go on for the grace. Infinite: never. Whole milliseconds, at most 24 days.
  absl::Duration max_connection_age = absl::InfiniteDuration();
  absl::Duration max_connection_grace = absl::Minutes(2);
};

// Thread-safe. Health names: "" and "liveness" (SERVING while the process works), "readiness" and every gRPC service's full
// name (as SetReady says).
class ServiceHost {
 public:
  // UNAVAILABLE names the address that could not be bound.
  static absl::StatusOr<std::unique_ptr<ServiceHost>> Start(HostOptions options);
  virtual ~ServiceHost() = default;
  virtual void SetReady(bool ready) = 0;
  virtual std::shared_ptr<grpc::Channel> InProcessChannel() = 0;
  // Port bound for `listen`, `health_listen`, `metrics_listen`; 0: none.
  virtual int port() const = 0;
  virtual int health_port() const = 0;
  virtual int metrics_port() const = 0;
  // Not ready; waits up to `grace` for running calls, then cancels them. Call once, never from a signal handler.
  virtual void Shutdown(absl::Duration grace) = 0;
};

}  // namespace orrery
