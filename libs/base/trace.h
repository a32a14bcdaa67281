// Trace context after the W3C recommendation "Trace Context" (level 1): which call of which client a log line belongs to.
//
//   const TraceScope scope(context);  // lines of this thread end with ` trace_id=…` until the scope ends
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace orrery {

// A place in a trace: the trace's id of 128 bits, and one span (a call, as its caller saw it) in it.
struct TraceContext {
  uint64_t trace_high = 0;  // first half of the id
  uint64_t trace_low = 0;
  uint64_t span = 0;
  bool sampled = false;  // the caller may have recorded the trace; passed on as it came

  // Neither id is 0. What is not valid stands for no trace.
  bool valid() const { return (trace_high != 0 || trace_low != 0) && span != 0; }
  // 32 lowercase hexadecimal digits.
  std::string trace_id() const;
  // "00-TRACE_ID-SPAN-FLAGS", 55 characters.
  std::string traceparent() const;
  // A new span in the same trace: what the next call sends.
  TraceContext Child() const;
};

// A header `traceparent`. Version 00 is taken exactly, later ones by what they share with it. Nothing: not one, such as
// ids of zeros or uppercase digits.
std::optional<TraceContext> ParseTraceparent(absl::string_view text);
// A new trace with its first span; sampled. Ids are random: they do not repeat but by chance.
TraceContext NewTrace();

// The thread's trace from construction to the end of the scope, on the same thread. One that is not valid: none.
class TraceScope {
 public:
  explicit TraceScope(const TraceContext& context);
  ~TraceScope();
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  const TraceContext before_;
};
// Of the innermost scope on this thread; outside of all not valid.
TraceContext CurrentTrace();

}  // namespace orrery
