#include "services/replay/sample_parts.h"

#include <algorithm>
#include <string>
#include <vector>

#include "libs/base/status.h"
#include "libs/client/chunk_proto.h"

namespace orrery {
namespace {
using Part = replay::v1::SampleSequencesResponse;

static_assert(static_cast<int>(DType::kUInt8) == common::v1::UINT8);
static_assert(static_cast<int>(DType::kInt32) == common::v1::INT32);
static_assert(static_cast<int>(DType::kInt64) == common::v1::INT64);
static_assert(static_cast<int>(DType::kFloat32) == common::v1::FLOAT32);
static_assert(static_cast<int>(DType::kFloat64) == common::v1::FLOAT64);

absl::Status Gone() { return absl::CancelledError("the caller is gone"); }

void AddStarts(const SequenceBatch& batch, Part& part) {
  for (const SequenceBatch::Start& start : batch.Starts()) {
    replay::v1::SampledStart& sent = *part.add_starts();
    *sent.mutable_chunk() = ToProto(start.chunk);
    sent.set_begin(start.begin);
    sent.set_probability(start.probability);
  }
}

// `part` is used again for every part: its memory is there already.
absl::Status SendField(const SequenceBatch& batch, size_t index, bool is_last, Part& part, const SendPart& send) {
  const EncodedRows::Field& field = batch.fields()[index];
  const auto sequences = static_cast<int64_t>(batch.sequences().size());
  const int64_t sequence_bytes = batch.length() * field.row_bytes;
  const int64_t per_part = std::clamp<int64_t>(kSamplePartBytes / std::max<int64_t>(sequence_bytes, 1), 1, sequences);
  part.mutable_field()->set_name(field.name);
  common::v1::Tensor& tensor = *part.mutable_field()->mutable_tensor();
  tensor.set_data_type(static_cast<common::v1::DataType>(field.dtype));
  for (int64_t first = 0; first < sequences; first += per_part) {
    const int64_t count = std::min(per_part, sequences - first);
    part.set_first_sequence(static_cast<int32_t>(first));
    tensor.clear_shape();
    tensor.add_shape(count);
    tensor.add_shape(batch.length());
    for (const int64_t size : field.row_shape) tensor.add_shape(size);
    std::string& data = *tensor.mutable_data();
    data.resize(count * sequence_bytes);
    RETURN_IF_ERROR(batch.Read(index, first, count, data.data()));
    part.set_last_part(is_last && first + count == sequences);
    if (part.last_part()) AddStarts(batch, part);
    if (!send(part)) return Gone();
  }
  return absl::OkStatus();
}
}  // namespace

absl::Status SendSampledFields(const SequenceBatch& batch, int64_t number, const SendPart& send) {
  Part part;
  part.set_batch(number);
  for (size_t i = 0; i < batch.fields().size(); ++i) {
    RETURN_IF_ERROR(SendField(batch, i, i + 1 == batch.fields().size(), part, send));
  }
  return absl::OkStatus();
}

absl::Status SendSampledChunks(const SequenceBatch& batch, int64_t number, const SendPart& send) {
  Part part;
  part.set_batch(number);
  int64_t bytes = 0;
  for (const SequenceBatch::Source& source : batch.chunks()) {
    const auto size = static_cast<int64_t>(source.rows->payload().size());
    if (bytes > 0 && bytes + size > kSamplePartBytes) {
      if (!send(part)) return Gone();
      part.clear_chunks();
      bytes = 0;
    }
    bytes += size;
    replay::v1::SampledChunk& chunk = *part.add_chunks();
    *chunk.mutable_key() = ToProto(source.key);
    chunk.set_rows(static_cast<int32_t>(source.rows->rows()));
    chunk.set_payload(source.rows->payload());
  }
  if (!send(part)) return Gone();
  part.clear_chunks();
  const std::vector<SequenceBatch::Start> starts = batch.Starts();
  for (size_t i = 0; i < starts.size(); ++i) {
    replay::v1::SampledSequence& sequence = *part.add_sequences();
    sequence.set_probability(starts[i].probability);
    for (const SequenceBatch::Slice& slice : batch.sequences()[i]) {
      replay::v1::SampledSlice& sent = *sequence.add_slices();
      sent.set_chunk(slice.chunk);
      sent.set_begin(slice.begin);
      sent.set_rows(slice.rows);
    }
  }
  part.set_last_part(true);
  return send(part) ? absl::OkStatus() : Gone();
}

}  // namespace orrery
