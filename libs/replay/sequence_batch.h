// A batch of sequences as parts of encoded chunks: what a replay server reads from its store and may send as it is.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/base/array.h"
#include "libs/replay/chunk_codec.h"
#include "libs/replay/store.h"

namespace orrery {

// B sequences of L rows each. Rows are decoded when they are read. Thread-safe: it never changes.
class SequenceBatch {
 public:
  struct Source {
    ChunkKey key;
    std::shared_ptr<const EncodedRows> rows;  // not null
  };
  // Some rows of one chunk.
  struct Slice {
    int32_t chunk = 0;  // place in `chunks`
    int32_t begin = 0;  // first row within the chunk
    int32_t rows = 0;
  };

  // Where a sequence begins and how it was drawn.
  struct Start {
    ChunkKey chunk;
    int32_t begin = 0;       // first row within the chunk
    double probability = 0;  // with which a draw gives it, above 0 and at most 1; 0: not known
    bool operator==(const Start&) const = default;
  };

  // A decoded batch, and the payloads of its chunks together, take no more.
  static constexpr int64_t kMaxBytes = int64_t{1} << 30;

  // `sequences`: the slices of each, in order. `probabilities`: of each, as in Start; empty: none is known. INVALID_ARGUMENT:
  // no sequence, sequences of different lengths or of none, another number of probabilities or one outside 0 to 1, or a batch
  // above kMaxBytes. DATA_LOSS: a slice that is not in its chunk, or chunks of different fields.
  static absl::StatusOr<SequenceBatch> Create(std::vector<Source> chunks, std::vector<std::vector<Slice>> sequences,
                                              std::vector<double> probabilities = {});

  int64_t length() const { return length_; }
  const std::vector<Source>& chunks() const { return chunks_; }
  const std::vector<std::vector<Slice>>& sequences() const { return sequences_; }
  // Of every sequence.
  std::vector<Start> Starts() const;
  // The fields of every chunk, by name, ascending; their places in the payload differ.
  const std::vector<EncodedRows::Field>& fields() const { return chunks_[0].rows->fields(); }

  // Copies sequences first … first + count - 1, which must be there, of fields()[field] to `to`: count * L * row_bytes bytes.
  // DATA_LOSS: a chunk is damaged.
  absl::Status Read(size_t field, int64_t first, int64_t count, char* to) const;
  // Every field as [B, L, …]. The memory of `batch` is used again where it fits.
  absl::Status ReadAll(ArrayMap& batch) const;

 private:
  SequenceBatch(std::vector<Source> chunks, std::vector<std::vector<Slice>> sequences, std::vector<double> probabilities,
                int64_t length);

  std::vector<Source> chunks_;
  std::vector<std::vector<Slice>> sequences_;
  std::vector<double> probabilities_;  // empty, or one for each sequence
  int64_t length_ = 0;
};

}  // namespace orrery
