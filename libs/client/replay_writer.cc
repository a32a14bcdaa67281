#include <deque>
#include <map>
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
using replay::v1::AppendChunksRequest;
using replay::v1::AppendChunksResponse;
using Stream = grpc::ClientReaderWriter<AppendChunksRequest, AppendChunksResponse>;

constexpr size_t kMaxFailuresKept = 1024;

// One thread sends, and while a stream is open a second one reads its acknowledgements. The queue holds what is not yet
// acknowledged, in order; its first `sent_` entries went out on the current stream.
class ReplayWriterImpl : public ReplayWriter {
 public:
  ReplayWriterImpl(std::shared_ptr<grpc::Channel> channel, std::string run, Options options)
      : run_(std::move(run)),
        options_(options),
        stub_(replay::v1::ReplayService::NewStub(std::move(channel))),
        next_heartbeat_(absl::Now() + options_.heartbeat),
        sender_([this] { Run(); }) {}

  ~ReplayWriterImpl() override {
    {
      absl::MutexLock lock(&mu_);
      closed_ = true;
      if (context_ != nullptr) context_->TryCancel();
      changed_.SignalAll();
    }
    sender_.join();
  }

  absl::Status Append(Chunk chunk, absl::Time deadline) override {
    if (chunk.payload.empty() || static_cast<int64_t>(chunk.payload.size()) > kMaxPayloadBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("chunk payload of ", chunk.payload.size(), " bytes: expected 1 to ", kMaxPayloadBytes));
    }
    auto request = std::make_shared<AppendChunksRequest>();
    request->set_run(run_);
    std::string payload = std::move(chunk.payload);
    *request->mutable_chunk() = ToProto(chunk);
    request->mutable_chunk()->set_payload(std::move(payload));
    if (const TraceContext trace = CurrentTrace(); trace.valid()) request->set_traceparent(trace.Child().traceparent());
    const int64_t bytes = static_cast<int64_t>(request->ByteSizeLong());
    absl::MutexLock lock(&mu_);
    while (true) {
      if (auto failure = failures_.find(chunk.info.key.episode_id); failure != failures_.end()) return failure->second;
      if (queue_.empty() || unacknowledged_bytes_ + bytes <= options_.max_unacknowledged_bytes) break;
      if (absl::Now() >= deadline) {
        return absl::DeadlineExceededError(absl::StrCat("replay has not acknowledged ", unacknowledged_bytes_,
                                                        " bytes: a chunk of ", bytes, " does not fit"));
      }
      changed_.WaitWithDeadline(&mu_, deadline);
    }
    queue_.push_back({std::move(request), bytes});
    unacknowledged_bytes_ += bytes;
    changed_.SignalAll();
    return absl::OkStatus();
  }

  absl::Status Flush(absl::Time deadline) override {
    absl::MutexLock lock(&mu_);
    while (!queue_.empty()) {
      if (absl::Now() >= deadline) {
        return absl::DeadlineExceededError(absl::StrCat("replay has not acknowledged ", queue_.size(), " chunks: ",
                                                        last_error_.message()));
      }
      changed_.WaitWithDeadline(&mu_, deadline);
    }
    return std::exchange(unreported_failure_, absl::OkStatus());
  }

  void KeepAlive(std::vector<int64_t> episode_ids) override {
    absl::MutexLock lock(&mu_);
    alive_ = std::move(episode_ids);
    changed_.SignalAll();
  }

  int64_t unacknowledged_bytes() const override {
    absl::MutexLock lock(&mu_);
    return unacknowledged_bytes_;
  }

 private:
  struct Entry {
    std::shared_ptr<const AppendChunksRequest> request;
    int64_t bytes = 0;
  };

  void Run() {
    Backoff backoff;
    while (AwaitWork()) {
      const TraceScope trace(NewTrace());  // of the stream; the chunks have those of their episodes
      const absl::Status status = RunStream(backoff);
      absl::MutexLock lock(&mu_);
      if (closed_) return;
      HandleEnd(status);
      const absl::Time until = absl::Now() + backoff.Next();
      while (!closed_ && absl::Now() < until) changed_.WaitWithDeadline(&mu_, until);
    }
  }

  // Waits until there is something to send; false when closed.
  bool AwaitWork() {
    absl::MutexLock lock(&mu_);
    while (!closed_ && !HasWork()) WaitForWork();
    return !closed_;
  }

  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return sent_ < queue_.size() || HeartbeatDue(); }
  bool HeartbeatDue() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !alive_.empty() && absl::Now() >= next_heartbeat_;
  }
  void WaitForWork() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    changed_.WaitWithDeadline(&mu_, alive_.empty() ? absl::InfiniteFuture() : next_heartbeat_);
  }

  // Opens a stream and sends on it until it breaks or the writer is closed.
  absl::Status RunStream(Backoff& backoff) {
    grpc::ClientContext context;
    SendTrace(context);
    {
      absl::MutexLock lock(&mu_);
      if (closed_) return absl::CancelledError("closed");
      sent_ = 0;
      broken_ = false;
      context_ = &context;
    }
    const std::unique_ptr<Stream> stream = stub_->AppendChunks(&context);
    {
      absl::MutexLock lock(&mu_);
      if (closed_) context.TryCancel();  // closed before there was a call to cancel
    }
    std::thread reader([&] { ReadAcknowledgements(*stream, context, backoff); });
    while (std::shared_ptr<const AppendChunksRequest> request = NextToSend()) {
      if (!stream->Write(*request)) break;
    }
    stream->WritesDone();
    reader.join();
    const absl::Status status = FromGrpc(stream->Finish());
    absl::MutexLock lock(&mu_);
    context_ = nullptr;
    return protocol_error_.ok() ? status : std::exchange(protocol_error_, absl::OkStatus());
  }

  // The next message for the current stream, waiting for one; null when the stream broke or the writer was closed.
  std::shared_ptr<const AppendChunksRequest> NextToSend() {
    absl::MutexLock lock(&mu_);
    while (!closed_ && !broken_ && !HasWork()) WaitForWork();
    if (closed_ || broken_) return nullptr;
    if (HeartbeatDue()) {
      next_heartbeat_ = absl::Now() + options_.heartbeat;
      auto request = std::make_shared<AppendChunksRequest>();
      request->set_run(run_);
      request->mutable_alive_episode_ids()->Add(alive_.begin(), alive_.end());
      return request;
    }
    return queue_[sent_++].request;
  }

  // Until the stream ends. Acknowledgements come in the order of sending.
  void ReadAcknowledgements(Stream& stream, grpc::ClientContext& context, Backoff& backoff) {
    AppendChunksResponse response;
    while (stream.Read(&response)) {
      absl::MutexLock lock(&mu_);
      if (!Acknowledge(response)) {
        context.TryCancel();
        break;
      }
      backoff.Reset();
    }
    absl::MutexLock lock(&mu_);
    broken_ = true;
    changed_.SignalAll();
  }

  bool Acknowledge(const AppendChunksResponse& response) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (sent_ == 0 || queue_.front().request->chunk().episode_id() != response.episode_id() ||
        queue_.front().request->chunk().first_row() != response.first_row()) {
      protocol_error_ = absl::InternalError(absl::StrCat("replay acknowledged episode ", response.episode_id(), " row ",
                                                         response.first_row(), ", which is not the next chunk sent"));
      return false;
    }
    unacknowledged_bytes_ -= queue_.front().bytes;
    queue_.pop_front();
    --sent_;
    changed_.SignalAll();
    return true;
  }

  // Of the oldest chunk; the stream's where it has none.
  TraceContext TraceOfFirst() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return ParseTraceparent(queue_.front().request->traceparent()).value_or(CurrentTrace());
  }

  // A final error is about the oldest chunk sent and not acknowledged: its episode is given up, the others go on.
  void HandleEnd(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const bool about_chunk = IsFinalError(status.code()) && sent_ > 0;
    if (status.code() != last_error_.code()) {
      LogWarning("replay stream ended error=\"{}\" unacknowledged_chunks={}", status.ToString(), queue_.size());
    }
    last_error_ = status;
    sent_ = 0;
    if (!about_chunk) return;
    const int64_t episode = queue_.front().request->chunk().episode_id();
    {
      const TraceScope trace(TraceOfFirst());
      LogError("replay refused episode={} error=\"{}\"", episode, status.ToString());
    }
    failures_[episode] = status;
    if (failures_.size() > kMaxFailuresKept) failures_.erase(failures_.begin());
    if (unreported_failure_.ok()) unreported_failure_ = status;
    std::deque<Entry> kept;
    for (Entry& entry : queue_) {
      if (entry.request->chunk().episode_id() == episode) {
        unacknowledged_bytes_ -= entry.bytes;
      } else {
        kept.push_back(std::move(entry));
      }
    }
    queue_ = std::move(kept);
    changed_.SignalAll();
  }

  // Constant after construction.
  const std::string run_;
  const Options options_;
  const std::unique_ptr<replay::v1::ReplayService::Stub> stub_;

  mutable absl::Mutex mu_;
  absl::CondVar changed_;
  std::deque<Entry> queue_ ABSL_GUARDED_BY(mu_);
  size_t sent_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t unacknowledged_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<int64_t, absl::Status> failures_ ABSL_GUARDED_BY(mu_);  // by episode
  absl::Status unreported_failure_ ABSL_GUARDED_BY(mu_);
  absl::Status last_error_ ABSL_GUARDED_BY(mu_);
  absl::Status protocol_error_ ABSL_GUARDED_BY(mu_);
  std::vector<int64_t> alive_ ABSL_GUARDED_BY(mu_);
  absl::Time next_heartbeat_ ABSL_GUARDED_BY(mu_);
  bool broken_ ABSL_GUARDED_BY(mu_) = false;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mu_) = nullptr;

  std::thread sender_;  // last: it uses everything above
};
}  // namespace

std::unique_ptr<ReplayWriter> ReplayWriter::Create(std::shared_ptr<grpc::Channel> channel, std::string run,
                                                   Options options) {
  return std::make_unique<ReplayWriterImpl>(std::move(channel), std::move(run), options);
}

}  // namespace orrery
