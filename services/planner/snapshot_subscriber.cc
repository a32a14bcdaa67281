#include "services/planner/snapshot_subscriber.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/status.h"
#include "libs/client/trace.h"

namespace orrery {
namespace {

// A question that replay answers from memory.
constexpr absl::Duration kAskTimeout = absl::Seconds(5);
// A whole snapshot over a slow network.
constexpr absl::Duration kFetchTimeout = absl::Minutes(2);
// A subscription that lasted longer did begin.
constexpr absl::Duration kStream = absl::Seconds(10);

}  // namespace

class SnapshotSubscriber::Call {
 public:
  explicit Call(SnapshotSubscriber* subscriber, absl::Duration timeout = absl::InfiniteDuration())
      : subscriber_(subscriber) {
    SendTrace(context_);
    if (timeout != absl::InfiniteDuration()) context_.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    absl::MutexLock lock(&subscriber_->mu_);
    subscriber_->context_ = &context_;
    if (subscriber_->closed_) context_.TryCancel();
  }
  ~Call() {
    absl::MutexLock lock(&subscriber_->mu_);
    subscriber_->context_ = nullptr;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  grpc::ClientContext* context() { return &context_; }

 private:
  SnapshotSubscriber* const subscriber_;
  grpc::ClientContext context_;
};

SnapshotSubscriber::SnapshotSubscriber(Options options)
    : options_(std::move(options)),
      learner_(options_.learner == nullptr ? nullptr : learner::v1::LearnerService::NewStub(options_.learner)),
      replay_(options_.replay == nullptr ? nullptr : replay::v1::ReplayService::NewStub(options_.replay)),
      thread_([this] { Loop(); }) {}

SnapshotSubscriber::~SnapshotSubscriber() {
  {
    absl::MutexLock lock(&mu_);
    closed_ = true;
    if (context_ != nullptr) context_->TryCancel();
    woken_.SignalAll();
  }
  thread_.join();
}

bool SnapshotSubscriber::closed() const {
  absl::MutexLock lock(&mu_);
  return closed_;
}

bool SnapshotSubscriber::Wait(absl::Duration duration) {
  absl::MutexLock lock(&mu_);
  const absl::Time until = options_.clock->Now() + duration;
  while (!closed_ && options_.clock->Now() < until) options_.clock->WaitUntil(woken_, mu_, until);
  return !closed_;
}

SnapshotVersion SnapshotSubscriber::Newest() const { return options_.holder->state().newest.value_or(SnapshotVersion{}); }

void SnapshotSubscriber::Loop() {
  while (!closed()) {
    const TraceScope trace(NewTrace());
    const absl::Time begin = options_.clock->Now();
    absl::Status learner = learner_ == nullptr ? absl::OkStatus() : Subscribe();
    if (closed()) return;
    if (learner_ != nullptr && options_.clock->Now() - begin > kStream) {
      // Streams end when their connection is old enough: no trouble unless the next one fails, too.
      learner = absl::OkStatus();
      backoff_.Reset();
    }
    const absl::Status replay = replay_ == nullptr ? absl::OkStatus() : AskReplay();
    if (closed()) return;
    NoteTrouble(learner, replay);
    Wait(learner_ == nullptr ? options_.poll_interval : backoff_.Next());
  }
}

void SnapshotSubscriber::NoteTrouble(const absl::Status& learner, const absl::Status& replay) {
  const std::string trouble =
      absl::StrCat(learner.ok() ? "" : absl::StrCat(" learner=\"", learner.ToString(), "\""),
                   replay.ok() ? "" : absl::StrCat(" replay=\"", replay.ToString(), "\""));
  if (trouble == trouble_) return;
  trouble_ = trouble;
  if (!trouble.empty()) LogWarning("no new snapshots for now, trying on{}", trouble);
}

absl::Status SnapshotSubscriber::Subscribe() {
  Call call(this);
  auto stream = learner_->SubscribeSnapshots(call.context());
  learner::v1::SubscribeSnapshotsRequest progress;
  progress.set_run(options_.run);
  progress.set_planner_id(options_.planner_id);
  // A failed write needs no handling: the next read fails too, and Finish tells why.
  const auto report = [&] {
    if (const SnapshotVersion newest = Newest(); newest != SnapshotVersion{}) {
      *progress.mutable_serving_version() = ToProto(newest);
    }
    stream->Write(progress);
  };
  report();
  SnapshotAssembler assembler;
  learner::v1::SubscribeSnapshotsResponse response;
  absl::Status damaged;
  while (damaged.ok() && stream->Read(&response)) {
    const absl::StatusOr<bool> complete = assembler.Add(response.part());
    if (!complete.ok()) {
      damaged = Annotate(complete.status(), "snapshot from the learner");
      call.context()->TryCancel();
    } else if (*complete) {
      backoff_.Reset();
      if (std::exchange(trouble_, "") != "") LogInfo("snapshots come from the learner again");
      const Store::Snapshot snapshot = assembler.Take();
      // A refused one is logged and counted by the holder; the answer tells the learner what is served instead.
      options_.holder->Load(snapshot.file, snapshot.version).IgnoreError();
      report();
    }
  }
  const absl::Status ended = FromGrpc(stream->Finish());
  return damaged.ok() ? ended : damaged;
}

absl::StatusOr<SnapshotVersion> SnapshotSubscriber::AskVersion() {
  Call call(this, kAskTimeout);
  replay::v1::GetStatsRequest request;
  request.set_run(options_.run);
  replay::v1::GetStatsResponse stats;
  RETURN_IF_ERROR(FromGrpc(replay_->GetStats(call.context(), request, &stats)));
  if (!stats.has_snapshot_version()) return SnapshotVersion{};
  return FromProto(stats.snapshot_version());
}

absl::StatusOr<Store::Snapshot> SnapshotSubscriber::Fetch() {
  Call call(this, kFetchTimeout);
  replay::v1::GetSnapshotRequest request;
  request.set_run(options_.run);
  auto stream = replay_->GetSnapshot(call.context(), request);
  SnapshotAssembler assembler;
  replay::v1::GetSnapshotResponse response;
  while (stream->Read(&response)) {
    const absl::StatusOr<bool> complete = assembler.Add(response.part());
    if (complete.ok() && !*complete) continue;
    call.context()->TryCancel();  // nothing more is expected
    stream->Finish();
    if (!complete.ok()) return Annotate(complete.status(), "snapshot from replay");
    return assembler.Take();
  }
  RETURN_IF_ERROR(FromGrpc(stream->Finish()));
  return absl::UnavailableError("the snapshot from replay ended before its last part");
}

absl::Status SnapshotSubscriber::AskReplay() {
  ASSIGN_OR_RETURN(const SnapshotVersion newest, AskVersion());
  if (newest <= Newest()) return absl::OkStatus();
  if (newest == refused_ && options_.clock->Now() < refused_until_) return absl::OkStatus();
  const absl::StatusOr<Store::Snapshot> fetched = Fetch();
  bool refused = absl::IsDataLoss(fetched.status()) || absl::IsInvalidArgument(fetched.status());  // its parts are damaged
  if (fetched.ok()) {
    // A refused one is logged and counted by the holder.
    const absl::Status loaded = options_.holder->Load(fetched->file, fetched->version);
    refused = !loaded.ok() && !absl::IsAlreadyExists(loaded);
  }
  if (refused) {
    refused_ = newest;
    refused_until_ = options_.clock->Now() + kRefusedPause;
  }
  return fetched.status();
}

}  // namespace orrery
