#include "libs/replay/memory_store.h"

#include <map>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "libs/base/status.h"
#include "libs/replay/change_log.h"
#include "libs/replay/chunk_text.h"

namespace orrery {
namespace {

// Thread-safe. Never fails but for the caller's mistakes.
class MemoryStore : public Store {
 public:
  MemoryStore(size_t change_log_length, Clock& clock) : clock_(clock), log_(change_log_length) {}

  absl::Status Append(const Chunk& chunk) override {
    RETURN_IF_ERROR(CheckChunk(chunk));
    absl::MutexLock lock(&mu_);
    const auto [kept, is_new] = chunks_.try_emplace(chunk.info.key, chunk);
    if (is_new) {
      log_.Append(chunk.info);
    } else if (InfoText(kept->second.info) != InfoText(chunk.info) || kept->second.payload != chunk.payload ||
               kept->second.run_id != chunk.run_id) {
      return OtherContents(chunk.info.key);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<std::optional<Chunk>>> Read(absl::Span<const ChunkKey> keys) override {
    std::vector<std::optional<Chunk>> chunks;
    absl::MutexLock lock(&mu_);
    for (const ChunkKey& key : keys) {
      const auto chunk = chunks_.find(key);
      chunks.push_back(chunk == chunks_.end() ? std::nullopt : std::optional<Chunk>(chunk->second));
    }
    return chunks;
  }

  absl::StatusOr<ChangeBatch> Changes(const std::string& cursor, int max, absl::Duration wait) override {
    return log_.Read(cursor, max, wait);
  }

  absl::Status Evict(absl::Span<const ChunkKey> keys) override {
    absl::MutexLock lock(&mu_);
    for (const ChunkKey& key : keys) {
      chunks_.erase(key);
      log_.Evict(key);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<VersionedValue> Get(const std::string& name) override {
    RETURN_IF_ERROR(CheckName("name of a value", name));
    absl::MutexLock lock(&mu_);
    const auto value = values_.find(name);
    return value == values_.end() ? VersionedValue{} : value->second;
  }

  absl::Status CompareAndSet(const std::string& name, int64_t expected_version, const std::string& value) override {
    RETURN_IF_ERROR(CheckName("name of a value", name));
    absl::MutexLock lock(&mu_);
    VersionedValue& kept = values_[name];
    if (kept.version != expected_version) {
      return absl::AbortedError(absl::StrCat("value '", name, "' has version ", kept.version, ", not ", expected_version));
    }
    kept = {value, NextVersion(expected_version, value)};
    return absl::OkStatus();
  }

  absl::Status PutSnapshot(const Snapshot& snapshot) override {
    absl::MutexLock lock(&mu_);
    if (snapshot.version > snapshot_.version) snapshot_ = snapshot;
    return absl::OkStatus();
  }

  absl::StatusOr<Snapshot> GetSnapshot() override {
    absl::MutexLock lock(&mu_);
    if (snapshot_.version == SnapshotVersion{}) return absl::NotFoundError("no snapshot yet");
    return snapshot_;
  }

  absl::StatusOr<absl::Time> Now() override { return clock_.Now(); }

 private:
  Clock& clock_;
  ChangeLog log_;  // its lock is taken after mu_
  absl::Mutex mu_;
  std::map<ChunkKey, Chunk> chunks_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, VersionedValue> values_ ABSL_GUARDED_BY(mu_);
  Snapshot snapshot_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

std::unique_ptr<Store> MakeMemoryStore(const StoreOptions& options, Clock& clock) {
  return std::make_unique<MemoryStore>(options.change_log_length, clock);
}

}  // namespace orrery
