// Batches that a replay server draws, for a learner without a mirror of the data set.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "libs/base/array.h"
#include "libs/replay/chunk_priorities.h"
#include "libs/replay/sequence_batch.h"
#include "orrery/replay/v1/replay.grpc.pb.h"

namespace orrery {

// One call of SampleSequences. The chunks come encoded and are decoded here, the next batches on threads of their own while
// the caller works with one. One consumer thread; Close from any.
//
//   auto stream = SequenceStream::Create(channel, {.run = "cartpole", .batch_size = 50, .sequence_length = 50});
//   ArrayMap batch;
//   RETURN_IF_ERROR(stream->Next(batch, deadline));
//
// With PrioritizedSampler, `starts` tells what a sequence must be weighted with and which chunk gets a new priority of it:
//
//   std::vector<SequenceBatch::Start> starts;
//   RETURN_IF_ERROR(stream->Next(batch, starts, deadline));
//   … {starts[i].chunk, error of sequence i} …
//   RETURN_IF_ERROR(stream->UpdatePriorities(priorities, deadline).status());
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
  absl::Status Next(ArrayMap& batch, absl::Time deadline) {
    std::vector<SequenceBatch::Start> starts;
    return Next(batch, starts, deadline);
  }
  // The same, with where each of the B sequences begins and how probable it was.
  virtual absl::Status Next(ArrayMap& batch, std::vector<SequenceBatch::Start>& starts, absl::Time deadline) = 0;
  // Tells the server 1 to 65536 priorities, each 0 to kMaxPriority: how many of them were for chunks that it has. Where several
  // replicas are behind one name, each has priorities of its own and any of them may answer: let the channel name one that is
  // to sample. UNAVAILABLE is tried again until the deadline; other errors are the server's. Thread-safe.
  virtual absl::StatusOr<int> UpdatePriorities(absl::Span<const ChunkPriority> priorities, absl::Time deadline) = 0;
  virtual void Close() = 0;
};

}  // namespace orrery
