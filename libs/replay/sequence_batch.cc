#include "libs/replay/sequence_batch.h"

#include <algorithm>
#include <cassert>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_text.h"

namespace orrery {
namespace {

// Whether all chunks have the fields of the first one.
absl::Status CheckFields(const std::vector<SequenceBatch::Source>& chunks) {
  const std::vector<EncodedRows::Field>& expected = chunks[0].rows->fields();
  for (const SequenceBatch::Source& chunk : chunks) {
    const std::vector<EncodedRows::Field>& fields = chunk.rows->fields();
    if (fields.empty() || fields.size() != expected.size()) {
      return absl::DataLossError(
          absl::StrCat(Place(chunk.key), " has ", fields.size(), " fields: expected ", std::max<size_t>(1, expected.size())));
    }
    for (size_t i = 0; i < fields.size(); ++i) {
      const EncodedRows::Field& field = fields[i];
      if (field.name != expected[i].name) {
        return absl::DataLossError(
            absl::StrCat(Place(chunk.key), " has a field \"", field.name, "\": expected \"", expected[i].name, "\""));
      }
      if (field.dtype == expected[i].dtype && field.row_shape == expected[i].row_shape) continue;
      return absl::DataLossError(absl::StrCat(Place(chunk.key), ": a row of field \"", field.name, "\" is ", Name(field.dtype),
                                              " ", ShapeString(field.row_shape), ": expected ", Name(expected[i].dtype), " ",
                                              ShapeString(expected[i].row_shape)));
    }
  }
  return absl::OkStatus();
}

// The rows of a sequence, all of which must be there.
absl::StatusOr<int64_t> LengthOf(const std::vector<SequenceBatch::Source>& chunks,
                                 const std::vector<SequenceBatch::Slice>& slices) {
  int64_t length = 0;
  for (const SequenceBatch::Slice& slice : slices) {
    if (slice.chunk < 0 || static_cast<size_t>(slice.chunk) >= chunks.size()) {
      return absl::DataLossError(absl::StrCat("a slice of chunk ", slice.chunk, ": expected 0 to ", chunks.size() - 1));
    }
    const SequenceBatch::Source& chunk = chunks[slice.chunk];
    if (slice.begin < 0 || slice.rows < 1 || slice.begin > chunk.rows->rows() - slice.rows) {
      return absl::DataLossError(absl::StrCat(slice.rows, " rows from row ", slice.begin, " of the ", Place(chunk.key),
                                              ": expected rows of its ", chunk.rows->rows()));
    }
    length += slice.rows;
  }
  return length;
}

absl::Status CheckBytes(const std::vector<SequenceBatch::Source>& chunks, int64_t sequences, int64_t length) {
  int64_t row_bytes = 0;
  for (const EncodedRows::Field& field : chunks[0].rows->fields()) row_bytes += field.row_bytes;
  if (row_bytes > 0 && sequences * length > SequenceBatch::kMaxBytes / row_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("a batch of ", sequences, " sequences of ", length, " rows of ", row_bytes,
                                                   " bytes: expected at most ", SequenceBatch::kMaxBytes, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status CheckProbabilities(const std::vector<double>& probabilities, size_t sequences) {
  if (!probabilities.empty() && probabilities.size() != sequences) {
    return absl::InvalidArgumentError(absl::StrCat(probabilities.size(), " probabilities: expected one for each of ", sequences,
                                                   " sequences"));
  }
  for (const double probability : probabilities) {
    if (probability >= 0 && probability <= 1) continue;
    return absl::InvalidArgumentError(absl::StrCat("a sequence of probability ", probability, ": expected 0 to 1"));
  }
  return absl::OkStatus();
}

}  // namespace

SequenceBatch::SequenceBatch(std::vector<Source> chunks, std::vector<std::vector<Slice>> sequences,
                             std::vector<double> probabilities, int64_t length)
    : chunks_(std::move(chunks)),
      sequences_(std::move(sequences)),
      probabilities_(std::move(probabilities)),
      length_(length) {}

absl::StatusOr<SequenceBatch> SequenceBatch::Create(std::vector<Source> chunks, std::vector<std::vector<Slice>> sequences,
                                                    std::vector<double> probabilities) {
  if (chunks.empty() || sequences.empty()) return absl::InvalidArgumentError("a batch without a sequence");
  RETURN_IF_ERROR(CheckFields(chunks));
  RETURN_IF_ERROR(CheckProbabilities(probabilities, sequences.size()));
  ASSIGN_OR_RETURN(const int64_t length, LengthOf(chunks, sequences[0]));
  if (length < 1) return absl::InvalidArgumentError("a sequence without a row");
  RETURN_IF_ERROR(CheckBytes(chunks, static_cast<int64_t>(sequences.size()), length));
  for (const std::vector<Slice>& slices : sequences) {
    ASSIGN_OR_RETURN(const int64_t rows, LengthOf(chunks, slices));
    if (rows == length) continue;
    return absl::InvalidArgumentError(absl::StrCat("a sequence of ", rows, " rows: expected ", length, " as in the first one"));
  }
  return SequenceBatch(std::move(chunks), std::move(sequences), std::move(probabilities), length);
}

std::vector<SequenceBatch::Start> SequenceBatch::Starts() const {
  std::vector<Start> starts;
  for (const std::vector<Slice>& slices : sequences_) {
    const double probability = probabilities_.empty() ? 0 : probabilities_[starts.size()];
    starts.push_back({chunks_[slices[0].chunk].key, slices[0].begin, probability});
  }
  return starts;
}

absl::Status SequenceBatch::Read(size_t field, int64_t first, int64_t count, char* to) const {
  assert(first >= 0 && count >= 0 && first <= static_cast<int64_t>(sequences_.size()) - count);
  for (int64_t i = first; i < first + count; ++i) {
    for (const Slice& slice : sequences_[i]) {
      const Source& chunk = chunks_[slice.chunk];
      const absl::Status status = chunk.rows->Read(field, slice.begin, slice.rows, to);
      if (!status.ok()) return Annotate(status, Place(chunk.key));
      to += slice.rows * fields()[field].row_bytes;
    }
  }
  return absl::OkStatus();
}

absl::Status SequenceBatch::ReadAll(ArrayMap& batch) const {
  const auto count = static_cast<int64_t>(sequences_.size());
  std::set<std::string> names;
  for (size_t i = 0; i < fields().size(); ++i) {
    const EncodedRows::Field& field = fields()[i];
    names.insert(field.name);
    Array& array = batch[field.name];
    array.dtype = field.dtype;
    array.shape = {count, length_};
    array.shape.insert(array.shape.end(), field.row_shape.begin(), field.row_shape.end());
    array.bytes.resize(count * length_ * field.row_bytes);
    RETURN_IF_ERROR(Read(i, 0, count, array.bytes.data()));
  }
  std::erase_if(batch, [&](const auto& entry) { return !names.contains(entry.first); });
  return absl::OkStatus();
}

}  // namespace orrery
