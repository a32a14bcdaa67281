// C++ client of the planner service.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "orrery/planner/v1/planner.grpc.pb.h"

namespace orrery {

// Thread-safe. Planners keep no session, so a call that fails with UNAVAILABLE (a planner that died, or has no snapshot yet),
// CANCELLED (one that ended meanwhile), RESOURCE_EXHAUSTED (its queue is full), INTERNAL (its device had no memory, or the
// connection broke) or UNKNOWN (a proxy's) is tried again, after growing random waits, until the deadline; then its last error
// is returned. Other errors are returned at once. A try gets half of the time that is left, but at least kShortestTry, so that
// a planner that hangs leaves time for another one: a channel of MakeChannel asks the next replica each time.
class PlannerClient {
 public:
  explicit PlannerClient(std::shared_ptr<grpc::Channel> channel);
  virtual ~PlannerClient() = default;

  // DATA_LOSS, too: the answer has another number of slots than the request.
  virtual absl::StatusOr<planner::v1::ActResponse> Act(const planner::v1::ActRequest& request, absl::Time deadline);
  // Empty name: the only model served.
  virtual absl::StatusOr<planner::v1::GetModelResponse> GetModel(const std::string& model, absl::Time deadline);
  virtual absl::StatusOr<planner::v1::ListModelsResponse> ListModels(absl::Time deadline);
  // Concerns one planner: use a channel to that one. Set `expected_version`: after an answer that was lost, the next try then
  // gives ABORTED instead of going back twice.
  virtual absl::StatusOr<planner::v1::RollbackResponse> Rollback(const planner::v1::RollbackRequest& request,
                                                                 absl::Time deadline);
  // Concerns one planner, too.
  virtual absl::StatusOr<planner::v1::ResumeResponse> Resume(const std::string& model, absl::Time deadline);

  static constexpr absl::Duration kShortestTry = absl::Seconds(5);

 private:
  const std::unique_ptr<planner::v1::PlannerService::Stub> stub_;
};

}  // namespace orrery
