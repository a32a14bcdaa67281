// The trace of a call on the client's side.
#pragma once

#include <grpcpp/client_context.h>

#include "libs/base/trace.h"

namespace orrery {

// The thread's trace, or a new one outside of any TraceScope.
inline TraceContext TraceHere() {
  const TraceContext current = CurrentTrace();
  return current.valid() ? current : NewTrace();
}

// Sends TraceHere() with the call, as a span of its own: `traceparent` in the metadata.
inline void SendTrace(grpc::ClientContext& context) {
  context.AddMetadata("traceparent", TraceHere().Child().traceparent());
}

}  // namespace orrery
