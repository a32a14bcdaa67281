// The trace of a call on the server's side, and the log lines that every call has in common.
#pragma once

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/server_interceptor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "libs/base/trace.h"

namespace orrery {

// What the caller sent as `traceparent`. Where that is none or wrong: the trace that the host began for the call, the same each
// time; on a server without the interceptors a new one. Handlers that log, on whatever thread, do so in a TraceScope of it:
// threads have no trace of their own.
TraceContext TraceOf(const grpc::ServerContextBase& context);

// Metadata of calls that are about more than one trace: the ids of the others, 32 digits each, separated by commas; at most
// kMaxTraceLinks. Anything else is ignored.
inline constexpr char kTraceLinksKey[] = "orrery-trace-links";
inline constexpr size_t kMaxTraceLinks = 64;

// For ServerBuilder. Give every call its trace, and log in it when its handler has ended it, with method, code and seconds: a warning for
// an error that says that the request or the server is wrong (LineLimit), all others, and what the limit left out, at debug.
std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> MakeCallInterceptors();

// Lets at most kPerSecond lines pass in a second. Thread-safe.
class LineLimit {
 public:
  static constexpr int kPerSecond = 10;
  // How many lines were left out since the last one that passed; nothing: this one is left out.
  std::optional<int64_t> Pass(absl::Time now) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  absl::Mutex mu_;
  absl::Time since_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  int passed_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t left_out_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace orrery
