#include "libs/replay/sampler.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"

namespace orrery {
namespace {

double OneOf(int64_t count) { return 1 / static_cast<double>(count); }

class UniformSampler : public Sampler {
 public:
  std::vector<Sequence> Draw(EpisodeIndex& index, int count, std::mt19937_64& random) const override {
    std::vector<Sequence> sequences;
    const int64_t starts = index.valid_starts();
    while (starts > 0 && static_cast<int>(sequences.size()) < count) {
      sequences.push_back(*index.Sample(random));
      sequences.back().probability = OneOf(starts);
    }
    return sequences;
  }
};

class RecencySampler : public Sampler {
 public:
  RecencySampler(double share, int64_t newest_rows) : share_(share), newest_rows_(newest_rows) {}

  std::vector<Sequence> Draw(EpisodeIndex& index, int count, std::mt19937_64& random) const override {
    std::vector<Sequence> sequences;
    const int64_t all = index.valid_starts();
    if (all == 0) return sequences;
    const std::vector<StartRange> newest = index.NewestStarts(newest_rows_);
    std::vector<StartRange> sorted = newest;
    std::sort(sorted.begin(), sorted.end(), Before);
    std::vector<int64_t> ends;  // of each range, counted over all of them
    int64_t starts = 0;
    for (const StartRange& range : newest) ends.push_back(starts += range.starts);
    std::bernoulli_distribution recent(share_);
    while (static_cast<int>(sequences.size()) < count) {
      if (starts == 0 || !recent(random)) {
        sequences.push_back(*index.Sample(random));
      } else {
        const int64_t position = std::uniform_int_distribution<int64_t>(0, starts - 1)(random);
        const auto range = std::upper_bound(ends.begin(), ends.end(), position) - ends.begin();
        const int64_t from_end = ends[range] - position;  // 1 is the last start of the range
        sequences.push_back(
            index.SequenceAt(newest[range].episode_id, newest[range].first_row + newest[range].starts - from_end));
      }
      Sequence& sequence = sequences.back();
      sequence.probability = starts == 0 ? OneOf(all) : (1 - share_) * OneOf(all);
      if (Holds(sorted, sequence)) sequence.probability += share_ * OneOf(starts);
    }
    return sequences;
  }

 private:
  static bool Before(const StartRange& a, const StartRange& b) {
    return std::tie(a.episode_id, a.first_row) < std::tie(b.episode_id, b.first_row);
  }
  // Whether the sequence begins in one of the ranges, which are in order and do not overlap.
  static bool Holds(const std::vector<StartRange>& ranges, const Sequence& sequence) {
    const StartRange begin{sequence.episode_id, sequence.first_row, 1};
    const auto after = std::upper_bound(ranges.begin(), ranges.end(), begin, Before);
    if (after == ranges.begin()) return false;
    const StartRange& range = *std::prev(after);
    return range.episode_id == begin.episode_id && begin.first_row < range.first_row + range.starts;
  }

  const double share_;
  const int64_t newest_rows_;
};

class TaskSampler : public Sampler {
 public:
  explicit TaskSampler(std::vector<double> weights) : weights_(std::move(weights)) {}

  std::vector<Sequence> Draw(EpisodeIndex& index, int count, std::mt19937_64& random) const override {
    std::vector<std::pair<int, int64_t>> tasks;  // with their starts
    std::vector<double> weights;
    double sum = 0;
    for (const auto& [task, starts] : index.task_starts()) {
      if (Weight(task) <= 0) continue;
      tasks.emplace_back(task, starts);
      weights.push_back(Weight(task));
      sum += Weight(task);
    }
    std::vector<Sequence> sequences;
    if (tasks.empty()) return sequences;
    std::discrete_distribution<int> choose(weights.begin(), weights.end());
    for (int i = 0; i < count; ++i) {
      const int chosen = choose(random);
      const auto& [task, starts] = tasks[chosen];
      sequences.push_back(*index.SampleTask(task, random));
      sequences.back().probability = weights[chosen] / sum * OneOf(starts);
    }
    return sequences;
  }

 private:
  double Weight(int task) const {
    if (weights_.empty()) return 1;
    return task >= 0 && task < static_cast<int>(weights_.size()) ? weights_[task] : 0;
  }

  const std::vector<double> weights_;
};

class PrioritizedSampler : public Sampler {
 public:
  PrioritizedSampler(double exponent, double uniform_share) : exponent_(exponent), uniform_share_(uniform_share) {}

  std::vector<Sequence> Draw(EpisodeIndex& index, int count, std::mt19937_64& random) const override {
    std::vector<Sequence> sequences;
    const int64_t starts = index.valid_starts();
    std::bernoulli_distribution uniform(uniform_share_);
    while (starts > 0 && static_cast<int>(sequences.size()) < count) {
      sequences.push_back(uniform(random) ? *index.Sample(random) : *index.SamplePrioritized(exponent_, random));
      Sequence& sequence = sequences.back();
      sequence.probability = uniform_share_ * OneOf(starts) +
                             (1 - uniform_share_) * index.PrioritizedProbability(exponent_, sequence.slices[0].key);
    }
    return sequences;
  }

 private:
  const double exponent_;
  const double uniform_share_;
};

}  // namespace

std::unique_ptr<Sampler> MakeUniformSampler() { return std::make_unique<UniformSampler>(); }

absl::StatusOr<std::unique_ptr<Sampler>> MakeRecencySampler(double share, int64_t newest_rows) {
  if (!(share >= 0 && share <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat("sampler.recency.share is ", share, ": expected 0 to 1"));
  }
  if (newest_rows < 1 || newest_rows > kMaxNewestRows) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampler.recency.newest_rows is ", newest_rows, ": expected 1 to ", kMaxNewestRows));
  }
  return std::make_unique<RecencySampler>(share, newest_rows);
}

absl::StatusOr<std::unique_ptr<Sampler>> MakeTaskSampler(std::vector<double> weights) {
  double sum = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!(weights[i] >= 0) || !std::isfinite(weights[i])) {
      return absl::InvalidArgumentError(
          absl::StrCat("sampler.tasks.weights[", i, "] is ", weights[i], ": expected a finite number of at least 0"));
    }
    sum += weights[i];
  }
  if (!weights.empty() && !(sum > 0 && std::isfinite(sum))) {
    return absl::InvalidArgumentError(absl::StrCat("sampler.tasks.weights add up to ", sum, ": expected above 0"));
  }
  return std::make_unique<TaskSampler>(std::move(weights));
}

absl::StatusOr<std::unique_ptr<Sampler>> MakePrioritizedSampler(double exponent, double uniform_share) {
  if (!(exponent >= 0 && exponent <= kMaxPriorityExponent)) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampler.prioritized.exponent is ", exponent, ": expected 0 to ", kMaxPriorityExponent));
  }
  if (!(uniform_share >= 0 && uniform_share <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("sampler.prioritized.uniform_share is ", uniform_share, ": expected 0 to 1"));
  }
  return std::make_unique<PrioritizedSampler>(exponent, uniform_share);
}

}  // namespace orrery
