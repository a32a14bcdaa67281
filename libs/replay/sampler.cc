#include "libs/replay/sampler.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"

namespace orrery {
namespace {

class UniformSampler : public Sampler {
 public:
  std::vector<Sequence> Draw(const EpisodeIndex& index, int count, std::mt19937_64& random) const override {
    std::vector<Sequence> sequences;
    while (static_cast<int>(sequences.size()) < count) {
      std::optional<Sequence> sequence = index.Sample(random);
      if (!sequence.has_value()) break;
      sequences.push_back(*std::move(sequence));
    }
    return sequences;
  }
};

class RecencySampler : public Sampler {
 public:
  RecencySampler(double share, int64_t newest_rows) : share_(share), newest_rows_(newest_rows) {}

  std::vector<Sequence> Draw(const EpisodeIndex& index, int count, std::mt19937_64& random) const override {
    std::vector<Sequence> sequences;
    if (index.valid_starts() == 0) return sequences;
    const std::vector<StartRange> newest = index.NewestStarts(newest_rows_);
    std::vector<int64_t> ends;  // of each range, counted over all of them
    int64_t starts = 0;
    for (const StartRange& range : newest) ends.push_back(starts += range.starts);
    std::bernoulli_distribution recent(share_);
    while (static_cast<int>(sequences.size()) < count) {
      if (starts == 0 || !recent(random)) {
        sequences.push_back(*index.Sample(random));
        continue;
      }
      const int64_t position = std::uniform_int_distribution<int64_t>(0, starts - 1)(random);
      const auto range = std::upper_bound(ends.begin(), ends.end(), position) - ends.begin();
      const int64_t from_end = ends[range] - position;  // 1 is the last start of the range
      sequences.push_back(
          index.SequenceAt(newest[range].episode_id, newest[range].first_row + newest[range].starts - from_end));
    }
    return sequences;
  }

 private:
  const double share_;
  const int64_t newest_rows_;
};

class TaskSampler : public Sampler {
 public:
  explicit TaskSampler(std::vector<double> weights) : weights_(std::move(weights)) {}

  std::vector<Sequence> Draw(const EpisodeIndex& index, int count, std::mt19937_64& random) const override {
    std::vector<int> tasks;
    std::vector<double> weights;
    for (const auto& [task, starts] : index.task_starts()) {
      if (Weight(task) <= 0) continue;
      tasks.push_back(task);
      weights.push_back(Weight(task));
    }
    std::vector<Sequence> sequences;
    if (tasks.empty()) return sequences;
    std::discrete_distribution<int> choose(weights.begin(), weights.end());
    for (int i = 0; i < count; ++i) sequences.push_back(*index.SampleTask(tasks[choose(random)], random));
    return sequences;
  }

 private:
  double Weight(int task) const {
    if (weights_.empty()) return 1;
    return task >= 0 && task < static_cast<int>(weights_.size()) ? weights_[task] : 0;
  }

  const std::vector<double> weights_;
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

}  // namespace orrery
