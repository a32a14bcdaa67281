// AppendChunks for any number of actors on a few threads.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <deque>
#include <functional>
#include <set>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "orrery/replay/v1/replay.grpc.pb.h"

namespace orrery {

// A message of a stream.
struct AppendMessage {
  replay::v1::AppendChunksRequest& request;
  absl::Time arrived;
  absl::Time deadline;            // of the stream
  const std::atomic<bool>& gone;  // true once the stream was cancelled
};

// Thread-safe. A stream that waits for a message costs its memory and no thread; messages are handled in the order of their
// coming, those of one stream one after the other. The host must be shut down before this is destroyed.
class AppendStreams {
 public:
  using Stream = grpc::ServerBidiReactor<replay::v1::AppendChunksRequest, replay::v1::AppendChunksResponse>;
  // Both may block; they run on the threads of this object, `take` in the message's trace, or the stream's where it has none.
  struct Handler {
    // True: `response` is the answer; false: there is none. An error ends the stream.
    std::function<absl::StatusOr<bool>(const AppendMessage& message, replay::v1::AppendChunksResponse& response)> take;
    // After the last message of a stream that no error ended; how it ends.
    std::function<absl::Status()> end;
  };

  // Starts threads as they are needed, at most `max_threads`, at least 1.
  AppendStreams(Handler handler, int max_threads);
  ~AppendStreams();
  AppendStreams(const AppendStreams&) = delete;
  AppendStreams& operator=(const AppendStreams&) = delete;

  // For a new call. gRPC owns neither; the stream deletes itself.
  Stream* Open(grpc::CallbackServerContext* context) ABSL_LOCKS_EXCLUDED(streams_mu_);
  // Cancels the streams, and answers later ones with UNAVAILABLE.
  void Shutdown() ABSL_LOCKS_EXCLUDED(streams_mu_);

 private:
  class StreamImpl;

  void Queue(StreamImpl* stream) ABSL_LOCKS_EXCLUDED(mu_);
  void Forget(StreamImpl* stream) ABSL_LOCKS_EXCLUDED(streams_mu_);
  // The next stream that has a message or has ended; null when this ends.
  StreamImpl* Next() ABSL_LOCKS_EXCLUDED(mu_);

  const Handler handler_;
  const size_t max_threads_;

  // Held while streams are cancelled, when gRPC may call them, and so Queue, on the same thread.
  absl::Mutex streams_mu_ ABSL_ACQUIRED_BEFORE(mu_);
  std::set<StreamImpl*> streams_ ABSL_GUARDED_BY(streams_mu_);  // not finished
  bool stopping_ ABSL_GUARDED_BY(streams_mu_) = false;

  absl::Mutex mu_;
  absl::CondVar queued_;
  std::deque<StreamImpl*> queue_ ABSL_GUARDED_BY(mu_);
  size_t idle_ ABSL_GUARDED_BY(mu_) = 0;  // threads that wait
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(mu_);
};

}  // namespace orrery
