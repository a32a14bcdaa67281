#include <deque>
#include <set>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/status.h"
#include "libs/client/channel.h"
#include "libs/client/chunk_proto.h"
#include "libs/client/replay_client.h"
#include "libs/client/status.h"
#include "libs/client/trace.h"

namespace orrery {
namespace {
using replay::v1::WatchChunksResponse;

constexpr int64_t kMaxQueuedBytes = int64_t{64} << 20;
constexpr size_t kMaxQueuedEvents = 4096;

// One thread reads the stream into a bounded queue; the consumer takes events from it.
class ChunkWatcherImpl : public ChunkWatcher {
 public:
  ChunkWatcherImpl(std::shared_ptr<grpc::Channel> channel, std::string run, bool include_evaluation)
      : run_(std::move(run)),
        include_evaluation_(include_evaluation),
        stub_(replay::v1::ReplayService::NewStub(std::move(channel))),
        reader_([this] { Run(); }) {}

  ~ChunkWatcherImpl() override {
    ChunkWatcherImpl::Close();
    reader_.join();
  }

  absl::StatusOr<Event> Next(absl::Time deadline) override {
    absl::MutexLock lock(&mu_);
    while (true) {
      if (closed_) return absl::CancelledError("the watcher was closed");
      if (!events_.empty()) break;
      if (!final_error_.ok()) return final_error_;
      if (absl::Now() >= deadline) return absl::DeadlineExceededError("no change of the data set until the deadline");
      changed_.WaitWithDeadline(&mu_, deadline);
    }
    Event event = std::move(events_.front());
    events_.pop_front();
    queued_bytes_ -= BytesOf(event);
    changed_.SignalAll();
    return event;
  }

  void Close() override {
    absl::MutexLock lock(&mu_);
    closed_ = true;
    if (context_ != nullptr) context_->TryCancel();
    changed_.SignalAll();
  }

 private:
  static int64_t BytesOf(const Event& event) {
    return event.appended.has_value() ? static_cast<int64_t>(event.appended->payload.size()) : 0;
  }

  void Run() {
    Backoff backoff;
    while (true) {
      const TraceScope trace(NewTrace());
      const absl::Status status = Watch(backoff);
      if (std::exchange(caught_up_, false)) {
        Event interrupted;
        interrupted.interrupted = true;
        Push(std::move(interrupted));
      }
      const bool too_old = absl::IsOutOfRange(status);
      if (too_old) cursor_.clear();
      absl::MutexLock lock(&mu_);
      if (closed_) return;
      if (IsFinalError(status.code()) && !too_old) {
        final_error_ = status;
        changed_.SignalAll();
        return;
      }
      if (status.code() != last_error_) LogWarning("watch of replay ended error=\"{}\"; trying again", status.ToString());
      last_error_ = status.code();
      const absl::Time until = absl::Now() + backoff.Next();
      while (!closed_ && absl::Now() < until) changed_.WaitWithDeadline(&mu_, until);
    }
  }

  // Reads one stream to its end.
  absl::Status Watch(Backoff& backoff) {
    grpc::ClientContext context;
    SendTrace(context);
    {
      absl::MutexLock lock(&mu_);
      if (closed_) return absl::CancelledError("closed");
      context_ = &context;
    }
    // Without a cursor the service does not tell what was evicted since: what was delivered before is void.
    if (cursor_.empty() && delivered_) {
      live_.clear();
      Event reset;
      reset.reset = true;
      Push(std::move(reset));
    }
    replay::v1::WatchChunksRequest request;
    request.set_run(run_);
    request.set_cursor(cursor_);
    request.set_include_evaluation(include_evaluation_);
    const auto stream = stub_->WatchChunks(&context, request);
    {
      absl::MutexLock lock(&mu_);
      if (closed_) context.TryCancel();  // closed before there was a call to cancel
    }
    WatchChunksResponse response;
    absl::Status status;
    while (status.ok() && stream->Read(&response)) {
      status = Handle(response);
      backoff.Reset();
    }
    if (!status.ok()) context.TryCancel();
    const absl::Status end = FromGrpc(stream->Finish());
    absl::MutexLock lock(&mu_);
    context_ = nullptr;
    if (!status.ok()) return status;
    return end.ok() ? absl::UnavailableError("the service ended the watch") : end;
  }

  absl::Status Handle(WatchChunksResponse& response) {
    Event event;
    if (response.has_appended()) {
      absl::StatusOr<Chunk> chunk = FromProto(std::move(*response.mutable_appended()));
      if (!chunk.ok()) return absl::DataLossError(absl::StrCat("replay sent a wrong chunk: ", chunk.status().message()));
      if (live_.insert(chunk->info.key).second) event.appended = *std::move(chunk);
    } else if (response.has_evicted()) {
      const ChunkKey key{response.evicted().episode_id(), response.evicted().first_row()};
      if (live_.erase(key) > 0) event.evicted = key;
    }
    event.caught_up = response.caught_up();
    const bool news = event.appended.has_value() || event.evicted.has_value() || (event.caught_up && !caught_up_);
    caught_up_ = caught_up_ || event.caught_up;
    if (news && !Push(std::move(event))) return absl::CancelledError("closed");
    cursor_ = response.cursor();
    return absl::OkStatus();
  }

  // Waits while the queue is full; false when closed.
  bool Push(Event event) {
    absl::MutexLock lock(&mu_);
    while (!closed_ && !events_.empty() &&
           (queued_bytes_ + BytesOf(event) > kMaxQueuedBytes || events_.size() >= kMaxQueuedEvents)) {
      changed_.Wait(&mu_);
    }
    if (closed_) return false;
    delivered_ = true;
    last_error_ = absl::StatusCode::kOk;
    queued_bytes_ += BytesOf(event);
    events_.push_back(std::move(event));
    changed_.SignalAll();
    return true;
  }

  // Constant after construction.
  const std::string run_;
  const bool include_evaluation_;
  const std::unique_ptr<replay::v1::ReplayService::Stub> stub_;

  // Of the reader thread only.
  std::string cursor_;
  std::set<ChunkKey> live_;
  bool caught_up_ = false;
  bool delivered_ = false;  // an event was

  absl::Mutex mu_;
  absl::CondVar changed_;
  std::deque<Event> events_ ABSL_GUARDED_BY(mu_);
  int64_t queued_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Status final_error_ ABSL_GUARDED_BY(mu_);
  absl::StatusCode last_error_ ABSL_GUARDED_BY(mu_) = absl::StatusCode::kOk;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mu_) = nullptr;

  std::thread reader_;  // last: it uses everything above
};
}  // namespace

std::unique_ptr<ChunkWatcher> ChunkWatcher::Create(std::shared_ptr<grpc::Channel> channel, std::string run,
                                                   bool include_evaluation) {
  return std::make_unique<ChunkWatcherImpl>(std::move(channel), std::move(run), include_evaluation);
}

}  // namespace orrery
