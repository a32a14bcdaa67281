// Ways of choosing actions, for evaluation.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "libs/client/planner_client.h"
#include "libs/envs/environment.h"
#include "libs/replay/store.h"

namespace orrery {

// Plays one episode after another. Not thread-safe.
class Policy {
 public:
  virtual ~Policy() = default;
  // Everything random in the episode comes from `seed`.
  virtual void Begin(uint64_t seed) = 0;
  virtual absl::StatusOr<std::vector<float>> Act(const ArrayMap& observation) = 0;
};

// Uniformly random actions, as in seed episodes.
class RandomPolicy : public Policy {
 public:
  explicit RandomPolicy(ActionSpec spec) : spec_(spec) {}
  void Begin(uint64_t seed) override;
  absl::StatusOr<std::vector<float>> Act(const ArrayMap& observation) override;

 private:
  const ActionSpec spec_;
  std::mt19937_64 random_;
};

// Asks a planner service, without exploration noise, for one snapshot of one model: that of its first answer, while the service
// keeps it. While it is away or busy it is asked again for up to `patience`; other errors, and an answer of a wrong size, are
// returned.
class PlannerPolicy : public Policy {
 public:
  // `model` may be empty where the service has only one.
  PlannerPolicy(std::shared_ptr<grpc::Channel> channel, ActionSpec spec, std::string model = "",
                absl::Duration patience = absl::Seconds(30));
  void Begin(uint64_t seed) override;
  absl::StatusOr<std::vector<float>> Act(const ArrayMap& observation) override;
  // What is served; waits for the first snapshot for up to the patience.
  absl::StatusOr<planner::v1::GetModelResponse> Model();
  // Newest snapshot that answered.
  SnapshotVersion version() const { return version_; }

 private:
  PlannerClient client_;
  const ActionSpec spec_;
  const std::string model_;
  const absl::Duration patience_;
  uint64_t seed_ = 0;
  uint64_t row_ = 0;
  std::string belief_;
  std::vector<float> previous_action_;
  SnapshotVersion version_;
};

// Another policy that does not get some modalities to see. The other must outlive it.
class BlindPolicy : public Policy {
 public:
  BlindPolicy(Policy& policy, std::vector<std::string> hidden) : policy_(policy), hidden_(std::move(hidden)) {}
  void Begin(uint64_t seed) override { policy_.Begin(seed); }
  absl::StatusOr<std::vector<float>> Act(const ArrayMap& observation) override;

 private:
  Policy& policy_;
  const std::vector<std::string> hidden_;
};

struct Evaluation {
  std::vector<double> returns;
  std::vector<int64_t> rows;
};
// Plays `episodes` episodes; the k-th has the seed DeriveSeed(seed, "evaluation", k), so that every policy meets the same.
absl::StatusOr<Evaluation> Evaluate(Environment& environment, Policy& policy, int episodes, uint64_t seed);

double Mean(const std::vector<double>& values);
// Of a sample: divided by n - 1; 0 for fewer than two values.
double SampleDeviation(const std::vector<double>& values);

}  // namespace orrery
