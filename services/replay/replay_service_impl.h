// The replay service over a store: what `orrery-replay` serves and what `orrery train` embeds.
//
//   ASSIGN_OR_RETURN(auto server, ReplayServer::Create({.experiment = e, .store = store.get(), .registry = registry}));
//   host_options.services = {server->service()};
//   ASSIGN_OR_RETURN(auto host, ServiceHost::Start(host_options));
//   server->Start([&](bool ready) { host->SetReady(ready); });
//   …
//   server->Shutdown();  // then host->Shutdown(…)
#pragma once

#include <grpcpp/grpcpp.h>
#include <prometheus/registry.h>

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "libs/config/config.h"
#include "libs/replay/store.h"

namespace orrery {

// Serves one run. Thread-safe. A thread of its own follows the store's changes, keeps an index of them, and evicts what is
// beyond replay.max_rows and replay.max_bytes. The host must be shut down before this is destroyed.
class ReplayServer {
 public:
  struct Options {
    config::v1::Experiment experiment;
    Store* store = nullptr;  // not owned; must outlive the server
    std::shared_ptr<prometheus::Registry> registry;
  };
  // INVALID_ARGUMENT for an experiment without a name, one whose pacing could never make progress, or one in which no
  // sequence could ever be whole.
  static absl::StatusOr<std::unique_ptr<ReplayServer>> Create(Options options);
  virtual ~ReplayServer() = default;
  virtual grpc::Service* service() = 0;
  // Begins to follow the store; `on_ready` is called from the server's thread with true once the index has caught up, with
  // false while the store cannot be reached. Call once.
  virtual void Start(std::function<void(bool)> on_ready) = 0;
  // Wakes every waiting handler with UNAVAILABLE, ends the streams, and stops the thread: `on_ready` is not called any
  // more. May be repeated.
  virtual void Shutdown() = 0;
};

}  // namespace orrery
