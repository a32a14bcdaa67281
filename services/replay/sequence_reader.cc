#include "services/replay/sequence_reader.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_codec.h"

namespace orrery {
namespace {
constexpr size_t kChunksPerRead = 32;

std::string Place(const ChunkKey& key) {
  return absl::StrCat("chunk of episode ", key.episode_id, " at row ", key.first_row);
}

int64_t BytesOf(const ArrayMap& rows) {
  int64_t bytes = 0;
  for (const auto& [name, array] : rows) bytes += static_cast<int64_t>(array.bytes.size());
  return bytes;
}

int64_t RowsOf(const Array& array) { return array.shape.empty() ? 0 : array.shape[0]; }

// Arrays [sequences, length, …] of the fields in `rows`, filled later.
absl::StatusOr<ArrayMap> MakeBatch(const ArrayMap& rows, int64_t sequences, int64_t length) {
  int64_t row_bytes = 0;
  for (const auto& [name, array] : rows) row_bytes += static_cast<int64_t>(array.bytes.size()) / RowsOf(array);
  if (row_bytes > 0 && sequences * length > SequenceReader::kMaxBatchBytes / row_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("a batch of ", sequences, " sequences of ", length, " rows of ", row_bytes,
                                                   " bytes: expected at most ", SequenceReader::kMaxBatchBytes, " bytes"));
  }
  ArrayMap batch;
  for (const auto& [name, array] : rows) {
    std::vector<int64_t> shape = {sequences, length};
    shape.insert(shape.end(), array.shape.begin() + 1, array.shape.end());
    batch[name] = Array::Zeros(array.dtype, std::move(shape));
  }
  return batch;
}

// Copies a slice's rows to row `at` of the batch, counted over all its sequences.
absl::Status CopySlice(const ArrayMap& rows, const ChunkSlice& slice, int64_t at, ArrayMap& batch) {
  if (rows.size() != batch.size()) {
    return absl::DataLossError(absl::StrCat(Place(slice.key), " has ", rows.size(), " fields: expected ", batch.size()));
  }
  for (auto& [name, target] : batch) {
    const auto field = rows.find(name);
    if (field == rows.end()) return absl::DataLossError(absl::StrCat(Place(slice.key), " has no field \"", name, "\""));
    const Array& source = field->second;
    const bool same_row = source.dtype == target.dtype && source.shape.size() + 1 == target.shape.size() &&
                          std::equal(source.shape.begin() + 1, source.shape.end(), target.shape.begin() + 2);
    if (!same_row || slice.begin < 0 || slice.rows < 0 || slice.begin + slice.rows > RowsOf(source)) {
      return absl::DataLossError(absl::StrCat(Place(slice.key), ": field \"", name, "\" is ", Name(source.dtype), " ",
                                              ShapeString(source.shape), ", unlike other chunks or its index"));
    }
    const size_t row_bytes = source.bytes.size() / RowsOf(source);
    std::memcpy(target.bytes.data() + at * row_bytes, source.bytes.data() + slice.begin * row_bytes,
                slice.rows * row_bytes);
  }
  return absl::OkStatus();
}
}  // namespace

absl::StatusOr<ArrayMap> SequenceReader::Read(const std::vector<Sequence>& sequences) {
  if (sequences.empty()) return ArrayMap{};
  RETURN_IF_ERROR(Prefetch(sequences));
  int64_t length = 0;
  for (const ChunkSlice& slice : sequences[0].slices) length += slice.rows;
  ArrayMap batch;
  for (size_t i = 0; i < sequences.size(); ++i) {
    int64_t at = static_cast<int64_t>(i) * length;
    for (const ChunkSlice& slice : sequences[i].slices) {
      ASSIGN_OR_RETURN(const Rows rows, Get(slice.key));
      if (batch.empty()) {
        ASSIGN_OR_RETURN(batch, MakeBatch(*rows, static_cast<int64_t>(sequences.size()), length));
      }
      RETURN_IF_ERROR(CopySlice(*rows, slice, at, batch));
      at += slice.rows;
    }
  }
  return batch;
}

absl::Status SequenceReader::Prefetch(const std::vector<Sequence>& sequences) {
  std::set<ChunkKey> wanted;
  for (const Sequence& sequence : sequences) {
    for (const ChunkSlice& slice : sequence.slices) wanted.insert(slice.key);
  }
  std::vector<ChunkKey> missing;
  for (const ChunkKey& key : wanted) {
    if (Find(key) == nullptr) missing.push_back(key);
  }
  for (size_t i = 0; i < missing.size(); i += kChunksPerRead) {
    RETURN_IF_ERROR(Load(absl::MakeConstSpan(missing).subspan(i, kChunksPerRead)).status());
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<SequenceReader::Rows>> SequenceReader::Load(absl::Span<const ChunkKey> keys) {
  ASSIGN_OR_RETURN(const std::vector<std::optional<Chunk>> chunks, store_->Read(keys));
  std::vector<Rows> loaded;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (i >= chunks.size() || !chunks[i].has_value()) return absl::NotFoundError(absl::StrCat(Place(keys[i]), " was evicted"));
    absl::StatusOr<ArrayMap> rows = DecodeRows(chunks[i]->payload, chunks[i]->info.rows);
    if (!rows.ok()) return Annotate(rows.status(), Place(keys[i]));
    if (rows->empty()) return absl::DataLossError(absl::StrCat(Place(keys[i]), " has no fields"));
    loaded.push_back(std::make_shared<const ArrayMap>(*std::move(rows)));
    Insert(keys[i], loaded.back());
  }
  return loaded;
}

absl::StatusOr<SequenceReader::Rows> SequenceReader::Get(const ChunkKey& key) {
  if (Rows rows = Find(key); rows != nullptr) return rows;
  ASSIGN_OR_RETURN(const std::vector<Rows> loaded, Load({key}));
  return loaded[0];
}

SequenceReader::Rows SequenceReader::Find(const ChunkKey& key) {
  absl::MutexLock lock(&mu_);
  const auto it = by_key_.find(key);
  if (it == by_key_.end()) return nullptr;
  recent_.splice(recent_.begin(), recent_, it->second);
  return it->second->rows;
}

void SequenceReader::Insert(const ChunkKey& key, Rows rows) {
  const int64_t bytes = BytesOf(*rows);
  absl::MutexLock lock(&mu_);
  if (by_key_.contains(key) || bytes > cache_bytes_) return;
  recent_.push_front({key, std::move(rows), bytes});
  by_key_[key] = recent_.begin();
  bytes_ += bytes;
  while (bytes_ > cache_bytes_) {
    bytes_ -= recent_.back().bytes;
    by_key_.erase(recent_.back().key);
    recent_.pop_back();
  }
}

}  // namespace orrery
