#include "services/replay/sequence_reader.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "libs/base/status.h"
#include "libs/replay/chunk_text.h"

namespace orrery {
namespace {
constexpr size_t kChunksPerRead = 8;  // each at most kMaxPayloadBytes

int64_t PayloadBytes(const EncodedRows& rows) { return rows.memory_bytes(); }
}  // namespace

absl::StatusOr<SequenceBatch> SequenceReader::Open(const std::vector<Sequence>& sequences, int64_t epoch) {
  Forget(epoch);
  std::vector<SequenceBatch::Source> chunks;
  std::map<ChunkKey, int32_t> numbers;
  std::vector<std::vector<SequenceBatch::Slice>> slices(sequences.size());
  std::vector<double> probabilities;
  for (size_t i = 0; i < sequences.size(); ++i) {
    for (const ChunkSlice& slice : sequences[i].slices) {
      const auto [number, is_new] = numbers.emplace(slice.key, static_cast<int32_t>(chunks.size()));
      if (is_new) chunks.push_back({slice.key, nullptr});
      slices[i].push_back({number->second, slice.begin, slice.rows});
    }
    probabilities.push_back(sequences[i].probability);
  }
  RETURN_IF_ERROR(Fill(chunks, epoch));
  return SequenceBatch::Create(std::move(chunks), std::move(slices), std::move(probabilities));
}

absl::Status SequenceReader::Fill(std::vector<SequenceBatch::Source>& chunks, int64_t epoch) {
  std::vector<size_t> missing;
  int64_t bytes = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    chunks[i].rows = Find(chunks[i].key);
    if (chunks[i].rows == nullptr) {
      missing.push_back(i);
    } else {
      bytes += PayloadBytes(*chunks[i].rows);
    }
  }
  for (size_t i = 0; i < missing.size(); i += kChunksPerRead) {
    const auto some = absl::MakeConstSpan(missing).subspan(i, kChunksPerRead);
    RETURN_IF_ERROR(Load(some, chunks, epoch));
    for (const size_t number : some) bytes += PayloadBytes(*chunks[number].rows);
    if (bytes > SequenceBatch::kMaxBytes) break;
  }
  if (bytes <= SequenceBatch::kMaxBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the chunks of a batch have more than ", SequenceBatch::kMaxBytes,
                                                 " bytes: expected a smaller batch"));
}

absl::Status SequenceReader::Load(absl::Span<const size_t> numbers, std::vector<SequenceBatch::Source>& chunks, int64_t epoch) {
  std::vector<ChunkKey> keys;
  for (const size_t number : numbers) keys.push_back(chunks[number].key);
  ASSIGN_OR_RETURN(std::vector<std::optional<Chunk>> read, store_->Read(keys));
  for (size_t i = 0; i < keys.size(); ++i) {
    if (i >= read.size() || !read[i].has_value()) return absl::NotFoundError(absl::StrCat(Place(keys[i]), " was evicted"));
    absl::StatusOr<EncodedRows> rows = EncodedRows::Open(std::move(read[i]->payload), read[i]->info.rows);
    if (!rows.ok()) return Annotate(rows.status(), Place(keys[i]));
    Rows& kept = chunks[numbers[i]].rows;
    kept = std::make_shared<const EncodedRows>(*std::move(rows));
    Insert(keys[i], kept, epoch);
  }
  return absl::OkStatus();
}

SequenceReader::Rows SequenceReader::Find(const ChunkKey& key) {
  absl::MutexLock lock(&mu_);
  const auto it = by_key_.find(key);
  if (it == by_key_.end()) return nullptr;
  recent_.splice(recent_.begin(), recent_, it->second);
  return it->second->rows;
}

void SequenceReader::Forget(int64_t epoch) {
  absl::MutexLock lock(&mu_);
  if (epoch <= epoch_) return;
  epoch_ = epoch;
  by_key_.clear();
  recent_.clear();
  bytes_ = 0;
}

void SequenceReader::Insert(const ChunkKey& key, Rows rows, int64_t epoch) {
  const int64_t bytes = PayloadBytes(*rows) + kChunkOverheadBytes;
  absl::MutexLock lock(&mu_);
  if (epoch != epoch_ || by_key_.contains(key) || bytes > cache_bytes_) return;
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
