// Which of the valid starts are drawn: one small interface, one class for each rule.
//
//   ASSIGN_OR_RETURN(auto sampler, MakeRecencySampler(0.5, 10000));
//   std::vector<Sequence> batch = sampler->Draw(index, 50, random);
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/replay/episode_index.h"

namespace orrery {

inline constexpr int64_t kMaxNewestRows = 1'000'000;

// Thread-safe: it has no state that changes. The index is used as by its other callers: one at a time.
class Sampler {
 public:
  virtual ~Sampler() = default;
  // `count` independent draws, each with its probability; none when there is nothing to draw from.
  virtual std::vector<Sequence> Draw(EpisodeIndex& index, int count, std::mt19937_64& random) const = 0;
};

// Every valid start is equally likely.
std::unique_ptr<Sampler> MakeUniformSampler();

// With probability `share` a sequence is drawn uniformly from those that EpisodeIndex::NewestStarts(newest_rows) gives, else,
// or when it gives none, from all. INVALID_ARGUMENT unless share is 0 to 1 and newest_rows 1 to kMaxNewestRows.
absl::StatusOr<std::unique_ptr<Sampler>> MakeRecencySampler(double share, int64_t newest_rows);

// First a task with a probability proportional to its weight among the tasks that have valid starts, then a start of it
// uniformly. `weights[i]` is that of task i, tasks beyond have 0; empty: all equal. When only tasks of weight 0 have valid
// starts there is none to draw. INVALID_ARGUMENT for a weight that is negative or not finite, or when all are 0.
absl::StatusOr<std::unique_ptr<Sampler>> MakeTaskSampler(std::vector<double> weights);

// With probability `uniform_share` every valid start is equally likely, else as EpisodeIndex::SamplePrioritized draws: by the
// priorities that the index was told. INVALID_ARGUMENT unless exponent is 0 to kMaxPriorityExponent and uniform_share 0 to 1.
inline constexpr double kDefaultPriorityExponent = 0.6, kDefaultUniformShare = 0.1;
absl::StatusOr<std::unique_ptr<Sampler>> MakePrioritizedSampler(double exponent, double uniform_share);

}  // namespace orrery
