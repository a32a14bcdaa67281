#include "services/replay/append_streams.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "libs/base/trace.h"
#include "libs/client/status.h"
#include "libs/telemetry/call_trace.h"

namespace orrery {

// Has one operation under way at a time: a read, a turn in the queue, or a write.
class AppendStreams::StreamImpl : public AppendStreams::Stream {
 public:
  StreamImpl(AppendStreams* owner, grpc::CallbackServerContext* context)
      : owner_(owner), context_(context), trace_(TraceOf(*context)), deadline_(absl::FromChrono(context->deadline())) {}

  void Begin() { StartRead(&request_); }
  void Cancel() { context_->TryCancel(); }

  void OnReadDone(bool ok) override {
    ended_ = !ok;
    arrived_ = absl::Now();
    owner_->Queue(this);
  }
  void OnWriteDone(bool ok) override {
    if (ok) {
      StartRead(&request_);
    } else {
      ended_ = true;
      owner_->Queue(this);
    }
  }
  void OnCancel() override { gone_ = true; }
  void OnDone() override { delete this; }

  // On a thread that may wait. What is started last may delete this.
  void Work() {
    if (ended_ || gone_) return End(owner_->handler_.end());  // a message that nobody waits for is sent again
    const TraceScope trace(ParseTraceparent(request_.traceparent()).value_or(trace_));
    const absl::StatusOr<bool> answered = owner_->handler_.take({request_, arrived_, deadline_, gone_}, response_);
    if (!answered.ok()) return End(answered.status());
    if (*answered) {
      StartWrite(&response_);
    } else {
      StartRead(&request_);
    }
  }

 private:
  void End(const absl::Status& status) {
    owner_->Forget(this);
    Finish(ToGrpc(status));
  }

  AppendStreams* const owner_;
  grpc::CallbackServerContext* const context_;
  const TraceContext trace_;
  const absl::Time deadline_;
  replay::v1::AppendChunksRequest request_;
  replay::v1::AppendChunksResponse response_;
  absl::Time arrived_;
  bool ended_ = false;  // no message comes any more
  std::atomic<bool> gone_ = false;
};

AppendStreams::AppendStreams(Handler handler, int max_threads)
    : handler_(std::move(handler)), max_threads_(static_cast<size_t>(std::max(1, max_threads))) {}

AppendStreams::~AppendStreams() {
  std::vector<std::thread> threads;
  {
    absl::MutexLock lock(&mu_);
    closed_ = true;
    queued_.SignalAll();
    threads.swap(threads_);
  }
  for (std::thread& thread : threads) thread.join();
}

AppendStreams::Stream* AppendStreams::Open(grpc::CallbackServerContext* context) {
  auto* const stream = new StreamImpl(this, context);
  bool stopping = false;
  {
    absl::MutexLock lock(&streams_mu_);
    stopping = stopping_;
    if (!stopping) streams_.insert(stream);
  }
  if (stopping) {
    stream->Finish(ToGrpc(absl::UnavailableError("replay is shutting down")));
  } else {
    stream->Begin();
  }
  return stream;
}

void AppendStreams::Shutdown() {
  absl::MutexLock lock(&streams_mu_);
  stopping_ = true;
  for (StreamImpl* const stream : streams_) stream->Cancel();
}

void AppendStreams::Queue(StreamImpl* stream) {
  absl::MutexLock lock(&mu_);
  queue_.push_back(stream);
  if (idle_ < queue_.size() && threads_.size() < max_threads_) {
    threads_.emplace_back([this] {
      while (StreamImpl* const next = Next()) next->Work();
    });
  }
  queued_.Signal();
}

void AppendStreams::Forget(StreamImpl* stream) {
  absl::MutexLock lock(&streams_mu_);
  streams_.erase(stream);
}

AppendStreams::StreamImpl* AppendStreams::Next() {
  absl::MutexLock lock(&mu_);
  ++idle_;
  while (queue_.empty() && !closed_) queued_.Wait(&mu_);
  --idle_;
  if (queue_.empty()) return nullptr;
  StreamImpl* const stream = queue_.front();
  queue_.pop_front();
  return stream;
}

}  // namespace orrery
