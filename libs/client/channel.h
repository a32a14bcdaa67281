// Channels to other services, and the waits between tries.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <random>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace orrery {

// Largest message that services and clients of this project take: a chunk of 64 MiB and what surrounds it.
inline constexpr int kMaxMessageBytes = 68 << 20;

// Insecure channel to HOST:PORT (or any gRPC target, such as "dns:///planner:7103"): keepalive every 10 s, round robin over
// the addresses of the name, messages up to kMaxMessageBytes, reconnects within 2 s. INVALID_ARGUMENT for an empty address.
absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const std::string& address);

// Whether trying the same again cannot help: the request, the run or the data is wrong, not the connection.
bool IsFinalError(absl::StatusCode code);

// Waits that double from `first` to `last`, each drawn from its upper half. Not thread-safe.
class Backoff {
 public:
  explicit Backoff(absl::Duration first = absl::Milliseconds(50), absl::Duration last = absl::Seconds(2));
  // The next wait.
  absl::Duration Next();
  void Reset() { current_ = first_; }

 private:
  const absl::Duration first_;
  const absl::Duration last_;
  absl::Duration current_;
  std::mt19937_64 random_;
};

// When a call is tried again.
struct RetryOptions {
  bool (*again)(absl::StatusCode code) = nullptr;  // after these errors
  Backoff backoff;
  // A try gets half of the time that is left, but at least this, and one that took all its time is followed by another.
  absl::Duration shortest_try = absl::InfiniteDuration();
  std::string what;  // in front of the last error when the deadline ends the tries; empty: nothing is
};
// Calls `call` until it succeeds, fails for good or `deadline` has passed; then the last status, OK or not. The call gets a fresh
// context with its deadline each time.
absl::Status Retry(absl::Time deadline, RetryOptions options, const std::function<grpc::Status(grpc::ClientContext&)>& call);
// The same until another code than UNAVAILABLE.
absl::Status RetryUnavailable(absl::Time deadline, const std::function<grpc::Status(grpc::ClientContext&)>& call);

}  // namespace orrery
