// A store that fails now and then, for tests of what is built on stores.
#pragma once

#include <atomic>

#include "libs/replay/store.h"

namespace orrery {

// Passes everything on to `inner`, but every `nth` operation fails with UNAVAILABLE: by turns before it was done (the
// request was lost) and after (the reply was lost). Thread-safe if `inner` is, which must outlive this.
class FaultStore : public Store {
 public:
  FaultStore(Store* inner, int nth) : inner_(inner), nth_(nth) {}
  int faults() const { return faults_; }

  absl::Status Append(const Chunk& chunk) override {
    return Try([&] { return inner_->Append(chunk); });
  }
  absl::StatusOr<std::vector<std::optional<Chunk>>> Read(absl::Span<const ChunkKey> keys) override {
    return Try([&] { return inner_->Read(keys); });
  }
  absl::StatusOr<ChangeBatch> Changes(const std::string& cursor, int max, absl::Duration wait) override {
    return Try([&] { return inner_->Changes(cursor, max, wait); });
  }
  absl::Status Evict(absl::Span<const ChunkKey> keys) override {
    return Try([&] { return inner_->Evict(keys); });
  }
  absl::StatusOr<VersionedValue> Get(const std::string& name) override {
    return Try([&] { return inner_->Get(name); });
  }
  absl::StatusOr<TimedValue> GetUnlessKnown(const std::string& name, const ValueIdentity& known) override {
    return Try([&] { return inner_->GetUnlessKnown(name, known); });
  }
  absl::Status CompareAndSet(const std::string& name, int64_t expected_version, const std::string& value) override {
    return Try([&] { return inner_->CompareAndSet(name, expected_version, value); });
  }
  absl::Status PutSnapshot(const Snapshot& snapshot) override {
    return Try([&] { return inner_->PutSnapshot(snapshot); });
  }
  absl::StatusOr<Snapshot> GetSnapshot() override {
    return Try([&] { return inner_->GetSnapshot(); });
  }
  absl::StatusOr<absl::Time> Now() override {
    return Try([&] { return inner_->Now(); });
  }

 private:
  template <typename F>
  auto Try(F operation) -> decltype(operation()) {
    const int64_t n = ++operations_;
    if (n % nth_ != 0) return operation();
    ++faults_;
    if (n / nth_ % 2 == 0) {
      const auto done = operation();
      return absl::UnavailableError("injected: the reply was lost");
    }
    return absl::UnavailableError("injected: the request was lost");
  }

  Store* const inner_;
  const int nth_;
  std::atomic<int64_t> operations_ = 0;
  std::atomic<int> faults_ = 0;
};

}  // namespace orrery
