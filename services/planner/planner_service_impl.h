// The planner service: requests in, batches through the engine, answers out.
#pragma once

#include <grpcpp/grpcpp.h>
#include <prometheus/registry.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/base/clock.h"
#include "libs/config/config.h"
#include "libs/serving/snapshot_holder.h"

namespace orrery {

// Owns the snapshots of each model, the queue of all and the thread that computes. Thread-safe.
//
//   ASSIGN_OR_RETURN(auto planner, PlannerServer::Create(options));
//   … ServiceHost::Start({… .services = {planner->service()}});
//   planner->snapshots().Load(file);
//   … host->Shutdown(grace); planner->Close();
class PlannerServer {
 public:
  struct Options {
    config::v1::PlannerService service;          // how requests are batched
    std::optional<config::v1::Planner> planner;  // of every model, instead of the snapshots' own
    std::string run;                             // name of a model whose snapshot does not say it
    // Names of the models by which requests choose, 1 to 128 characters each, unique, at most 64. Empty: one model, named by
    // its snapshots.
    std::vector<std::string> models;
    std::string device = "cpu";                  // "cpu", "cuda", "cuda:N"
    int threads = 1;                             // share a batch of plans on the CPU
    std::shared_ptr<prometheus::Registry> registry;  // required
    Clock* clock = &Clock::Real();                   // must outlive the server
    // Called once, when every model has a snapshot. Empty: nobody cares.
    std::function<void()> on_ready;
  };
  // INVALID_ARGUMENT names the option.
  static absl::StatusOr<std::unique_ptr<PlannerServer>> Create(Options options);
  virtual ~PlannerServer() = default;

  virtual grpc::Service* service() = 0;
  // Of the model at `index` in Options.models; 0 without names.
  virtual SnapshotHolder& snapshots(size_t index = 0) = 0;
  // Fails what waits and what comes later with UNAVAILABLE; returns when the running batch is done. May be called again.
  virtual void Close() = 0;
};

}  // namespace orrery
