// The messages that carry a batch of SampleSequences.
#pragma once

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "libs/replay/sequence_batch.h"
#include "orrery/replay/v1/replay.pb.h"

namespace orrery {

// What a part brings of values or payloads, as far as one sequence or chunk is not more.
inline constexpr int64_t kSamplePartBytes = int64_t{2} << 20;

// Calls `send` with each part of batch `number` until it returns false: then CANCELLED. Memory beside the batch's: one part.
// DATA_LOSS: a chunk is damaged; parts were sent.
using SendPart = std::function<bool(const replay::v1::SampleSequencesResponse&)>;
// Decoded, some sequences of one field in each part; where they begin in the last part.
absl::Status SendSampledFields(const SequenceBatch& batch, int64_t number, const SendPart& send);
// The chunks, then the slices of the sequences in the last part.
absl::Status SendSampledChunks(const SequenceBatch& batch, int64_t number, const SendPart& send);

}  // namespace orrery
