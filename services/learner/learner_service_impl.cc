#include "services/learner/learner_service_impl.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/log.h"
#include "libs/base/log_text.h"
#include "libs/base/trace.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/status.h"
#include "libs/telemetry/call_trace.h"

namespace orrery {
namespace {

using learner::v1::SubscribeSnapshotsRequest;
using learner::v1::SubscribeSnapshotsResponse;

constexpr size_t kMaxPlannerId = 128;

// One subscription: reads what the planner serves, writes the newest snapshot part by part. gRPC calls it from its own
// threads, the publisher from the learner's. Deletes itself when gRPC is done with it.
//
// Lock order: the publisher's before mu_, so the publisher is never called with mu_ held.
class Subscription final : public grpc::ServerBidiReactor<SubscribeSnapshotsRequest, SubscribeSnapshotsResponse>,
                           public SnapshotPublisher::Subscriber {
 public:
  Subscription(std::string run, SnapshotPublisher* publisher, const grpc::CallbackServerContext& context)
      : run_(std::move(run)), publisher_(publisher), trace_(TraceOf(context)) {
    StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    const TraceScope trace(trace_);
    if (!ok) {
      End(grpc::Status::OK);
      return;
    }
    const absl::StatusOr<SnapshotVersion> serving = Check();
    if (!serving.ok()) {
      End(ToGrpc(serving.status()));
      return;
    }
    if (planner_id_.empty()) {
      planner_id_ = request_.planner_id();
      LogInfo("planner subscribed planner=\"{}\" generation={} counter={}", LogText(planner_id_), serving->generation,
              serving->counter);
      publisher_->Subscribe(this, *serving);
    } else {
      publisher_->Acknowledge(this, *serving);
    }
    absl::MutexLock lock(&mu_);
    if (!ended_) StartRead(&request_);
  }

  void OnWriteDone(bool ok) override {
    if (!ok) {
      End(grpc::Status::CANCELLED);
      return;
    }
    absl::MutexLock lock(&mu_);
    writing_ = false;
    WriteNext();
  }

  void OnCancel() override { End(grpc::Status::CANCELLED); }

  void OnDone() override {
    publisher_->Unsubscribe(this);
    const TraceScope trace(trace_);
    if (!planner_id_.empty()) LogInfo("planner left planner=\"{}\"", LogText(planner_id_));
    delete this;
  }

  void OnSnapshot(std::shared_ptr<const PublishedSnapshot> snapshot) override {
    absl::MutexLock lock(&mu_);
    next_ = std::move(snapshot);
    if (!writing_) WriteNext();
  }

  void OnClose() override { End(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the learner is going away")); }

 private:
  absl::StatusOr<SnapshotVersion> Check() const {
    if (request_.planner_id().empty() || request_.planner_id().size() > kMaxPlannerId) {
      return absl::InvalidArgumentError(
          absl::StrCat("planner_id has ", request_.planner_id().size(), " characters, expected 1 to ", kMaxPlannerId));
    }
    if (!planner_id_.empty() && request_.planner_id() != planner_id_) {
      return absl::InvalidArgumentError(absl::StrCat("planner_id changed from \"", planner_id_, "\" to \"",
                                                     request_.planner_id(), "\" within one subscription"));
    }
    if (request_.run().empty()) return absl::InvalidArgumentError("run is not set");
    if (request_.run() != run_) {
      return absl::NotFoundError(absl::StrCat("run \"", request_.run(), "\": this learner's run is \"", run_, "\""));
    }
    return FromProto(request_.serving_version());
  }

  // Starts the next write, if there is something to write. A snapshot that has begun is sent to its end; then the newest
  // one follows, whatever came between.
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (ended_) return;
    if (current_ == nullptr || offset_ >= current_->file.size()) {
      current_ = std::exchange(next_, nullptr);
      offset_ = 0;
      if (current_ == nullptr) return;
    }
    common::v1::SnapshotPart& part = *response_.mutable_part();
    *part.mutable_version() = ToProto(current_->version);
    part.set_total_bytes(static_cast<int64_t>(current_->file.size()));
    part.set_checksum(current_->checksum);
    part.set_offset(static_cast<int64_t>(offset_));
    const size_t bytes = std::min<size_t>(kSnapshotPartBytes, current_->file.size() - offset_);
    part.set_data(current_->file.data() + offset_, bytes);
    offset_ += bytes;
    writing_ = true;
    StartWrite(&response_);
  }

  void End(const grpc::Status& status) {
    absl::MutexLock lock(&mu_);
    if (ended_) return;
    ended_ = true;
    Finish(status);
  }

  // Constant after construction.
  const std::string run_;
  SnapshotPublisher* const publisher_;
  const TraceContext trace_;  // of the call
  // Reads only, one at a time.
  SubscribeSnapshotsRequest request_;
  std::string planner_id_;  // empty until the first request

  absl::Mutex mu_;
  std::shared_ptr<const PublishedSnapshot> current_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<const PublishedSnapshot> next_ ABSL_GUARDED_BY(mu_);  // newest wins
  size_t offset_ ABSL_GUARDED_BY(mu_) = 0;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  SubscribeSnapshotsResponse response_ ABSL_GUARDED_BY(mu_);  // of the write in progress
};

}  // namespace

LearnerServiceImpl::LearnerServiceImpl(std::string run, SnapshotPublisher* publisher, std::function<Progress()> progress)
    : run_(std::move(run)), publisher_(publisher), progress_(std::move(progress)) {}

grpc::ServerBidiReactor<SubscribeSnapshotsRequest, SubscribeSnapshotsResponse>* LearnerServiceImpl::SubscribeSnapshots(
    grpc::CallbackServerContext* context) {
  return new Subscription(run_, publisher_, *context);
}

grpc::ServerUnaryReactor* LearnerServiceImpl::GetStatus(grpc::CallbackServerContext* context,
                                                        const learner::v1::GetStatusRequest* /*request*/,
                                                        learner::v1::GetStatusResponse* response) {
  const Progress progress = progress_();
  response->set_run(run_);
  response->set_updates(progress.updates);
  response->set_loss(progress.loss);
  response->set_subscribers(publisher_->subscribers());
  if (const SnapshotVersion version = publisher_->version(); version != SnapshotVersion{}) {
    *response->mutable_snapshot_version() = ToProto(version);
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace orrery
