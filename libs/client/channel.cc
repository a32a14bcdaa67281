#include "libs/client/channel.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "libs/base/status.h"
#include "libs/client/status.h"
#include "libs/client/trace.h"

namespace orrery {
namespace {
bool HasScheme(const std::string& address) {
  return absl::StrContains(address, "://") || absl::StartsWith(address, "unix:") || absl::StartsWith(address, "ipv4:") ||
         absl::StartsWith(address, "ipv6:");
}
}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const std::string& address) {
  if (address.empty()) return absl::InvalidArgumentError("address is empty: expected HOST:PORT");
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetLoadBalancingPolicyName("round_robin");
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 2'000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2'000);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // services talk to each other directly
  return grpc::CreateCustomChannel(HasScheme(address) ? address : absl::StrCat("dns:///", address),
                                   grpc::InsecureChannelCredentials(), arguments);
}

bool IsFinalError(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnauthenticated:
      return true;
    default:
      return false;
  }
}

Backoff::Backoff(absl::Duration first, absl::Duration last)
    : first_(first), last_(last), current_(first), random_(std::random_device()()) {}

absl::Duration Backoff::Next() {
  const double fraction = std::uniform_real_distribution<double>(0.5, 1.0)(random_);
  const absl::Duration wait = current_ * fraction;
  current_ = std::min(current_ * 2, last_);
  return wait;
}

absl::Status Retry(absl::Time deadline, RetryOptions options, const std::function<grpc::Status(grpc::ClientContext&)>& call) {
  const TraceScope trace(TraceHere());  // of all tries
  while (true) {
    const absl::Time now = absl::Now();
    const absl::Time until = std::min(deadline, now + std::max((deadline - now) / 2, options.shortest_try));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(until));
    SendTrace(context);
    const absl::Status status = FromGrpc(call(context));
    const bool hung = absl::IsDeadlineExceeded(status) && until < deadline;
    if (!hung && !options.again(status.code())) return status;
    const absl::Duration wait = options.backoff.Next();
    if (absl::Now() + wait >= deadline) {
      return options.what.empty() ? status : Annotate(status, absl::StrCat(options.what, ", until the deadline"));
    }
    absl::SleepFor(wait);
  }
}

absl::Status RetryUnavailable(absl::Time deadline, const std::function<grpc::Status(grpc::ClientContext&)>& call) {
  RetryOptions options;
  options.again = [](absl::StatusCode code) { return code == absl::StatusCode::kUnavailable; };
  return Retry(deadline, std::move(options), call);
}

}  // namespace orrery
