// Learner processes that learn from one batch together, each from its part of it.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace orrery {

// One rank's membership in the group. Ranks find each other through a TCPStore that rank 0 serves; what lies on the CPU crosses
// by Gloo, gradients on a GPU by NCCL. Not thread-safe.
//
// All ranks make the same calls in the same order, with equal sizes. UNAVAILABLE names the call: a rank was lost, or not there
// in time. From then on every call fails: all ranks have to end and be started again.
class DataParallel {
 public:
  struct Options {
    int rank = 0;        // 0 to size - 1
    int size = 1;        // ranks of the group
    int local_rank = 0;  // among those on this machine
    std::string master_address;
    int master_port = 0;
    bool serve_store = true;   // by rank 0; false: the launcher serves it (torchrun)
    std::string store_prefix;  // of the store's keys: another one for each attempt of a launcher whose store outlives them
    torch::Device device = torch::kCPU;            // of the gradients
    absl::Duration join_limit = absl::Minutes(5);  // until all ranks are there; at least 1 s
    absl::Duration limit = absl::Seconds(60);      // of every other call; at least 1 s
  };
  // From torchrun's variables WORLD_SIZE, RANK, LOCAL_RANK (0 when not set), MASTER_ADDR and MASTER_PORT. nullopt: WORLD_SIZE
  // is not set or 1. INVALID_ARGUMENT names the variable that is missing or wrong.
  static absl::StatusOr<std::optional<Options>> FromEnvironment();

  // Waits until all ranks are there. UNAVAILABLE: not within join_limit, or this rank was in this group before.
  static absl::StatusOr<std::unique_ptr<DataParallel>> Join(const Options& options);
  ~DataParallel();
  DataParallel(const DataParallel&) = delete;
  DataParallel& operator=(const DataParallel&) = delete;

  int rank() const { return options_.rank; }
  int size() const { return options_.size; }
  absl::Duration limit() const { return options_.limit; }

  // The mean over all ranks, in place, the same to the last bit for each; contiguous float32, on options.device.
  absl::Status Mean(torch::Tensor& values);
  // The sum over all ranks.
  absl::StatusOr<int64_t> Sum(int64_t number);
  // Rank 0's numbers or bytes to all. Of numbers every rank gives equally many, bytes may have any length.
  absl::Status Broadcast(absl::Span<int64_t> numbers);
  absl::Status Broadcast(std::string& bytes);

  // This rank's columns of a tensor that has those of all ranks, in their order, along `dim`. An undefined one stays so.
  torch::Tensor Part(const torch::Tensor& whole, int64_t dim) const;

 private:
  struct Group;  // what LibTorch has

  explicit DataParallel(Options options);
  absl::Status Connect();
  // Runs `call`, which throws when it fails.
  absl::Status Try(const char* what, absl::FunctionRef<void()> call);

  const Options options_;
  std::unique_ptr<Group> group_;
  absl::Status failure_;  // OK while the group works
};

}  // namespace orrery
