// A stored data set that nobody adds to: what `orrery train --offline` learns from.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/client/replay_client.h"
#include "libs/config/config.h"
#include "libs/replay/store.h"

namespace orrery {

// What was stored when it was opened; nothing is written. Thread-safe.
class OfflineData {
 public:
  struct Options {
    config::v1::Experiment experiment;  // that will learn from it; valid, its model complete
    std::string location;               // of the store: "file:FOLDER", "redis://…"
    std::string data_set;               // name of the run that collected it, or under which it was imported
  };
  // NOT_FOUND names the data sets that are there instead. FAILED_PRECONDITION: it has no rows for training, no episode as long
  // as a sequence, or rows of another specification, with the field or the hash. RESOURCE_EXHAUSTED: it would not fit in
  // learning.mirror_bytes.
  static absl::StatusOr<std::unique_ptr<OfflineData>> Open(const Options& options);

  // Every training chunk once, then nothing more. The data must outlive it.
  std::unique_ptr<ChunkWatcher> MakeWatcher() const;
  // Answers a learner as a replay service of this data would: grants every update asked for and keeps nothing.
  std::shared_ptr<ReplayClient> MakeReplay() const;
  int64_t rows() const { return rows_; }  // of training chunks

 private:
  explicit OfflineData(std::string data_set) : data_set_(std::move(data_set)) {}
  absl::Status ReadIndex(int sequence_length);
  absl::Status CheckRows(const config::v1::Experiment& experiment) const;

  // Constant after Open.
  const std::string data_set_;
  std::unique_ptr<Store> store_;
  std::vector<ChunkInfo> chunks_;  // for training, by episode and row
  int64_t rows_ = 0;
};

}  // namespace orrery
