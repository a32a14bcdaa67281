#include "services/replay/metered_store.h"

#include "libs/telemetry/metrics.h"

namespace orrery {
namespace {
bool IsFailure(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kOutOfRange:
      return false;
    default:
      return true;
  }
}

class MeteredStore : public Store {
 public:
  MeteredStore(Store* store, prometheus::Registry& registry)
      : store_(store),
        append_(Counter(registry, "append")),
        read_(Counter(registry, "read")),
        changes_(Counter(registry, "changes")),
        evict_(Counter(registry, "evict")),
        state_(Counter(registry, "state")),
        snapshot_(Counter(registry, "snapshot")) {}

  absl::Status Append(const Chunk& chunk) override { return Count(append_, store_->Append(chunk)); }
  absl::StatusOr<std::vector<std::optional<Chunk>>> Read(absl::Span<const ChunkKey> keys) override {
    return Count(read_, store_->Read(keys));
  }
  absl::StatusOr<ChangeBatch> Changes(const std::string& cursor, int max, absl::Duration wait) override {
    return Count(changes_, store_->Changes(cursor, max, wait));
  }
  absl::Status Evict(absl::Span<const ChunkKey> keys) override { return Count(evict_, store_->Evict(keys)); }
  absl::StatusOr<VersionedValue> Get(const std::string& name) override { return Count(state_, store_->Get(name)); }
  absl::StatusOr<TimedValue> GetUnlessKnown(const std::string& name, const ValueIdentity& known) override {
    return Count(state_, store_->GetUnlessKnown(name, known));
  }
  absl::Status CompareAndSet(const std::string& name, int64_t expected_version, const std::string& value) override {
    return Count(state_, store_->CompareAndSet(name, expected_version, value));
  }
  absl::Status PutSnapshot(const Snapshot& snapshot) override {
    return Count(snapshot_, store_->PutSnapshot(snapshot));
  }
  absl::StatusOr<Snapshot> GetSnapshot() override { return Count(snapshot_, store_->GetSnapshot()); }
  absl::StatusOr<absl::Time> Now() override { return Count(state_, store_->Now()); }

 private:
  static prometheus::Counter& Counter(prometheus::Registry& registry, const std::string& operation) {
    return AddCounter(registry, "replay_store_errors_total", "Operations of the store that failed.",
                      {{"operation", operation}});
  }
  static absl::Status Count(prometheus::Counter& counter, absl::Status status) {
    if (IsFailure(status.code())) counter.Increment();
    return status;
  }
  template <typename T>
  static absl::StatusOr<T> Count(prometheus::Counter& counter, absl::StatusOr<T> result) {
    if (IsFailure(result.status().code())) counter.Increment();
    return result;
  }

  Store* const store_;
  prometheus::Counter& append_;
  prometheus::Counter& read_;
  prometheus::Counter& changes_;
  prometheus::Counter& evict_;
  prometheus::Counter& state_;
  prometheus::Counter& snapshot_;
};
}  // namespace

std::unique_ptr<Store> MakeMeteredStore(Store* store, prometheus::Registry& registry) {
  return std::make_unique<MeteredStore>(store, registry);
}

}  // namespace orrery
