#include "libs/telemetry/call_trace.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "libs/base/log.h"
#include "libs/base/log_text.h"

namespace orrery {
namespace {
using grpc::experimental::InterceptionHookPoints;
using Metadata = std::multimap<grpc::string_ref, grpc::string_ref>;

constexpr char kTraceparentKey[] = "traceparent";
constexpr size_t kTraceIdLength = 32;

// Two headers are as wrong as none.
std::optional<TraceContext> Sent(const Metadata& metadata) {
  const auto [begin, end] = metadata.equal_range(kTraceparentKey);
  if (begin == end || std::next(begin) != end) return std::nullopt;
  return ParseTraceparent({begin->second.data(), begin->second.size()});
}

// " links=…", or nothing.
std::string LinksOf(const Metadata& metadata) {
  const auto found = metadata.find(kTraceLinksKey);
  if (found == metadata.end()) return "";
  const absl::string_view ids(found->second.data(), found->second.size());
  const bool whole = (ids.size() + 1) % (kTraceIdLength + 1) == 0 && ids.size() < kMaxTraceLinks * (kTraceIdLength + 1);
  if (!whole) return "";
  for (size_t i = 0; i < ids.size(); ++i) {
    const char c = ids[i];
    const bool separates = i % (kTraceIdLength + 1) == kTraceIdLength;
    if (separates ? c != ',' : !((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return "";
  }
  return absl::StrCat(" links=", ids);
}

// Errors that say that something is wrong. The others belong to a system at work: something is away, full, not there yet, taken by
// another, or nobody waits for it any more.
bool WorthALine(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::INVALID_ARGUMENT:
    case grpc::StatusCode::FAILED_PRECONDITION:
    case grpc::StatusCode::UNIMPLEMENTED:
    case grpc::StatusCode::UNKNOWN:
    case grpc::StatusCode::INTERNAL:
    case grpc::StatusCode::DATA_LOSS:
      return true;
    default:
      return false;
  }
}

// Of a method that nobody serves it is what the client sent.
std::string MethodName(absl::string_view path) {
  const bool plain = path.size() <= 200 && std::all_of(path.begin(), path.end(), [](unsigned char c) {
                       return absl::ascii_isalnum(c) || c == '/' || c == '.' || c == '_';
                     });
  return plain ? std::string(path) : "unknown";
}

std::string CodeName(grpc::StatusCode code) { return absl::StatusCodeToString(static_cast<absl::StatusCode>(code)); }

// One call.
class CallInterceptor : public grpc::experimental::Interceptor {
 public:
  CallInterceptor(const char* method, LineLimit* limit) : method_(method), limit_(limit), began_(absl::Now()) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      Begin(*methods->GetRecvInitialMetadata());
    }
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) End(methods->GetSendStatus());
    methods->Proceed();
  }

 private:
  void Begin(Metadata& metadata) {
    metadata_ = &metadata;
    if (const std::optional<TraceContext> sent = Sent(metadata); sent.has_value()) {
      trace_ = *sent;
      return;
    }
    trace_ = NewTrace();
    began_trace_ = trace_.traceparent();  // lives as long as the call
    metadata.erase(grpc::string_ref(kTraceparentKey));
    metadata.emplace(grpc::string_ref(kTraceparentKey), began_trace_);
  }

  void End(const grpc::Status& status) {
    const absl::Time now = absl::Now();
    const grpc::StatusCode code = status.error_code();
    std::optional<int64_t> left_out;
    if (WorthALine(code)) left_out = limit_->Pass(now);
    if (!left_out.has_value() && !spdlog::should_log(spdlog::level::debug)) return;
    std::string more = status.ok() ? "" : absl::StrCat(" error=\"", LogText(status.error_message()), "\"");
    if (left_out.value_or(0) > 0) absl::StrAppend(&more, " lines_left_out=", *left_out);
    if (metadata_ != nullptr) more += LinksOf(*metadata_);
    const double seconds = absl::ToDoubleSeconds(now - began_);
    const TraceScope scope(trace_);
    if (left_out.has_value()) {
      LogWarning("call ended method={} code={} seconds={:.6f}{}", MethodName(method_), CodeName(code), seconds, more);
    } else {
      LogDebug("call ended method={} code={} seconds={:.6f}{}", MethodName(method_), CodeName(code), seconds, more);
    }
  }

  const char* const method_;
  LineLimit* const limit_;
  const absl::Time began_;
  TraceContext trace_;
  std::string began_trace_;  // that the metadata point to; empty: the caller sent one
  const Metadata* metadata_ = nullptr;  // of the call, which outlives this
};

class CallInterceptorFactory : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  grpc::experimental::Interceptor* CreateServerInterceptor(grpc::experimental::ServerRpcInfo* info) override {
    return new CallInterceptor(info->method(), &limit_);
  }

 private:
  LineLimit limit_;
};
}  // namespace

TraceContext TraceOf(const grpc::ServerContextBase& context) {
  const std::optional<TraceContext> sent = Sent(context.client_metadata());
  return sent.has_value() ? *sent : NewTrace();
}

std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> MakeCallInterceptors() {
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> factories;
  factories.push_back(std::make_unique<CallInterceptorFactory>());
  return factories;
}

std::optional<int64_t> LineLimit::Pass(absl::Time now) {
  absl::MutexLock lock(&mu_);
  if (now < since_ || now - since_ >= absl::Seconds(1)) {  // the clock may be set back
    since_ = now;
    passed_ = 0;
  }
  if (passed_ == kPerSecond) {
    ++left_out_;
    return std::nullopt;
  }
  ++passed_;
  return std::exchange(left_out_, 0);
}

}  // namespace orrery
