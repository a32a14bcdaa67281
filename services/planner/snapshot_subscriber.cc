#include "services/planner/snapshot_subscriber.h"

#include <optional>
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

// The version that a part names, damaged or not.
std::optional<SnapshotVersion> Said(const common::v1::SnapshotPart& part) {
  const absl::StatusOr<SnapshotVersion> version = FromProto(part.version());
  return part.has_version() && version.ok() ? std::optional(*version) : std::nullopt;
}

}  // namespace

class SnapshotSubscriber::Call {
 public:
  explicit Call(SnapshotSubscriber* subscriber, absl::Duration timeout = absl::InfiniteDuration())
      : subscriber_(subscriber) {
    SendTrace(context_);
    if (timeout != absl::InfiniteDuration()) context_.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    absl::MutexLock lock(&subscriber_->mu_);
    subscriber_->contexts_.push_back(&context_);
    if (subscriber_->closed_) context_.TryCancel();
  }
  ~Call() {
    absl::MutexLock lock(&subscriber_->mu_);
    subscriber_->contexts_.pop_back();
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
    for (grpc::ClientContext* context : contexts_) context->TryCancel();
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
    if (learner_ != nullptr) ended_ = Subscribe();
    if (closed()) return;
    NoteTrouble(replay_ == nullptr ? absl::OkStatus() : AskReplay());
    Wait(learner_ == nullptr ? options_.poll_interval : backoff_.Next());
  }
}

void SnapshotSubscriber::NoteTrouble(const absl::Status& replay) {
  if (closed()) return;  // which cancels calls
  const std::string trouble =
      absl::StrCat(ended_.ok() ? "" : absl::StrCat(" learner=\"", ended_.ToString(), "\""),
                   replay.ok() ? "" : absl::StrCat(" replay=\"", replay.ToString(), "\""));
  if (trouble == trouble_) return;
  trouble_ = trouble;
  if (!trouble.empty()) LogWarning("no new snapshots for now, trying on{}", trouble);
}

bool SnapshotSubscriber::Await(grpc::CompletionQueue& queue) {
  void* tag = nullptr;
  bool ok = false;
  const auto next = [&] {
    const bool loaded = options_.holder->state().newest.has_value();
    const absl::Time until = replay_ == nullptr || loaded ? absl::InfiniteFuture() : absl::Now() + options_.poll_interval;
    return queue.AsyncNext(&tag, &ok, absl::ToChronoTime(until));
  };
  while (next() == grpc::CompletionQueue::TIMEOUT) {
    const TraceScope trace(NewTrace());
    NoteTrouble(AskReplay());
  }
  return ok;
}

absl::Status SnapshotSubscriber::Subscribe() {
  const absl::Time begin = options_.clock->Now();
  Call call(this);
  grpc::CompletionQueue queue;
  const auto stream = learner_->AsyncSubscribeSnapshots(call.context(), &queue, nullptr);
  Await(queue);
  learner::v1::SubscribeSnapshotsRequest progress;
  progress.set_run(options_.run);
  progress.set_planner_id(options_.planner_id);
  // A failed write needs no handling: the next read fails too, and Finish tells why.
  const auto report = [&] {
    if (const SnapshotVersion newest = Newest(); newest != SnapshotVersion{}) {
      *progress.mutable_serving_version() = ToProto(newest);
    }
    stream->Write(progress, nullptr);
    Await(queue);
  };
  report();
  SnapshotAssembler assembler;
  learner::v1::SubscribeSnapshotsResponse response;
  const auto read = [&] {
    stream->Read(&response, nullptr);
    return Await(queue);
  };
  absl::Status damaged;
  while (damaged.ok() && read()) {
    const absl::StatusOr<bool> complete = assembler.Add(response.part());
    if (!complete.ok()) {
      damaged = Annotate(complete.status(), "snapshot from the learner");
      options_.holder->Refuse(damaged, Said(response.part()));
      call.context()->TryCancel();
    } else if (*complete) {
      backoff_.Reset();
      ended_ = absl::OkStatus();
      if (std::exchange(trouble_, "") != "") LogInfo("snapshots come from the learner again");
      Load(assembler.Take());
      report();
    }
  }
  grpc::Status ended;
  stream->Finish(&ended, nullptr);
  Await(queue);
  if (!damaged.ok()) return damaged;
  if (options_.clock->Now() - begin <= kStream) return FromGrpc(ended);
  // Streams end when their connection is old enough: no trouble unless the next one fails, too.
  backoff_.Reset();
  return absl::OkStatus();
}

void SnapshotSubscriber::Load(const Store::Snapshot& snapshot) {
  // A refused one is logged and counted by the holder; the answer tells the learner what is served instead.
  const absl::Status loaded = options_.holder->Load(snapshot.file, snapshot.version);
  const bool older = absl::IsAlreadyExists(loaded) && snapshot.version < Newest();
  if (older && !told_older_) {
    LogWarning("the learner's snapshots are older than this planner's and not taken, as after a restore of older data: then restart "
               "the planner, error=\"{}\"",
               loaded.ToString());
  }
  told_older_ = older;
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
  if (refused) options_.holder->Refuse(fetched.status(), newest);
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
