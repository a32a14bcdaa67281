// orrery.learner.v1 over a snapshot publisher.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <string>

#include "libs/learning/snapshot_publisher.h"
#include "orrery/learner/v1/learner.grpc.pb.h"

namespace orrery {

// Thread-safe; a subscription holds no thread. Close the publisher before the server shuts down: it ends every
// subscription with UNAVAILABLE.
class LearnerServiceImpl : public learner::v1::LearnerService::CallbackService {
 public:
  struct Progress {
    int64_t updates = 0;
    double loss = 0;
  };
  // `publisher` must outlive the service; `progress` is called from any thread.
  LearnerServiceImpl(std::string run, SnapshotPublisher* publisher, std::function<Progress()> progress);

  grpc::ServerBidiReactor<learner::v1::SubscribeSnapshotsRequest, learner::v1::SubscribeSnapshotsResponse>*
  SubscribeSnapshots(grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context, const learner::v1::GetStatusRequest* request,
                                      learner::v1::GetStatusResponse* response) override;

 private:
  const std::string run_;
  SnapshotPublisher* const publisher_;
  const std::function<Progress()> progress_;
};

}  // namespace orrery
