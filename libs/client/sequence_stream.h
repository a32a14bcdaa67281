// Batches that a replay server draws, for a learner without a mirror of the data set.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "libs/base/array.h"
#include "orrery/replay/v1/replay.grpc.pb.h"

namespace orrery {

// One call of SampleSequences. The chunks come encoded and are decoded here, the next batches on threads of their own while
// the caller works with one. One consumer thread; Close from any.
//
//   auto stream = SequenceStream::Create(channel, {.run = "cartpole", .batch_size = 50, .sequence_length = 50});
//   ArrayMap batch;
//   RETURN_IF_ERROR(stream->Next(batch, deadline));
class SequenceStream {
 public:
  struct Options {
    std::string run;
    int batch_size = 0;       // B, 1 to 4096
    int sequence_length = 0;  // L, 1 to 1000
    int64_t batches = 0;      // 0: without end
    uint64_t seed = 0;        // 0: from the server's randomness
    replay::v1::Sampler sampler;
    int threads = 2;  // that decode, 1 to 64: each holds one batch beside the caller's
  };
  // Begins the call. Ranges that the server checks are reported by Next.
  static std::unique_ptr<SequenceStream> Create(const std::shared_ptr<grpc::Channel>& channel, const Options& options);
  virtual ~SequenceStream() = default;
  // The next batch, each field [B, L, …]; the memory of the last one is used again where it fits. DEADLINE_EXCEEDED: none until
  // then. OUT_OF_RANGE: all batches were given. CANCELLED: closed. DATA_LOSS: the server sent what it must not send. Other
  // errors are the server's. After any but DEADLINE_EXCEEDED there are no more batches; after UNAVAILABLE try a new stream.
  virtual absl::Status Next(ArrayMap& batch, absl::Time deadline) = 0;
  virtual void Close() = 0;
};

}  // namespace orrery
