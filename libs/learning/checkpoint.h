// What a learner needs to go on as if it had never stopped, on disk.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace orrery {

struct Checkpoint {
  int64_t updates = 0;
  int64_t generation = 0;                         // of the learner that wrote it
  std::string sampler;                            // state of the batch sampler
  std::string experiment;                         // effective configuration, text proto
  std::map<std::string, torch::Tensor> tensors;  // parameters, optimizer, generators: the updater's state
};

// One safetensors file; a checksum in its metadata covers every byte of it.
absl::StatusOr<std::string> SerializeCheckpoint(const Checkpoint& checkpoint);
// DATA_LOSS for any damage.
absl::StatusOr<Checkpoint> ParseCheckpoint(absl::string_view file);

// The checkpoints of one run in a folder: checkpoint-<updates, 12 digits>.safetensors. Not thread-safe; one learner per folder.
class CheckpointFolder {
 public:
  static constexpr int64_t kAny = 999'999'999'999;  // more updates than any name has

  // Makes the folder. `keep` at least 1.
  static absl::StatusOr<CheckpointFolder> Open(const std::string& folder, int keep);
  // Writes atomically, then removes all but the newest `keep` and this one. The first one removes before it what interrupted
  // writes left behind: only who may learn saves. RESOURCE_EXHAUSTED: the disk is full, and nothing changed.
  absl::Status Save(const Checkpoint& checkpoint);
  // The newest one that is whole, of those written before update `before`. A damaged one is logged, set aside (".damaged"
  // behind its name) and the one before it taken. NOT_FOUND: there is none, nor was one set aside. FAILED_PRECONDITION: none of
  // them can be used. The error of ReadFile: one cannot be read, and may be whole.
  absl::StatusOr<Checkpoint> LoadNewest(int64_t before = kAny);
  // Whether there is no checkpoint, whole or not.
  absl::StatusOr<bool> empty() const;

 private:
  CheckpointFolder(std::string folder, int keep) : folder_(std::move(folder)), keep_(keep) {}
  void RemoveTemporaryFiles();

  std::string folder_;
  int keep_;
  bool removed_temporary_files_ = false;
};

}  // namespace orrery
