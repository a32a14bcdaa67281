#include "tools/orrery/policy.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "libs/base/random.h"
#include "libs/base/status.h"
#include "services/actor/actor.h"

namespace orrery {

void RandomPolicy::Begin(uint64_t seed) { random_.seed(DeriveSeed(seed, "random_actions")); }

absl::StatusOr<std::vector<float>> RandomPolicy::Act(const ArrayMap&) { return RandomAction(spec_, random_); }

PlannerPolicy::PlannerPolicy(std::shared_ptr<grpc::Channel> channel, ActionSpec spec, std::string model,
                             absl::Duration patience)
    : client_(std::move(channel)), spec_(spec), model_(std::move(model)), patience_(patience) {}

void PlannerPolicy::Begin(uint64_t seed) {
  seed_ = seed;
  row_ = 0;
  belief_.clear();
  previous_action_.clear();
}

absl::StatusOr<std::vector<float>> PlannerPolicy::Act(const ArrayMap& observation) {
  planner::v1::ActRequest request;
  request.set_model(model_);
  request.set_client_id("orrery-eval");
  request.set_priority(planner::v1::EVALUATION);
  if (version_ != SnapshotVersion{}) {
    request.mutable_snapshot_version()->set_generation(version_.generation);
    request.mutable_snapshot_version()->set_counter(version_.counter);
  }
  *request.add_slots() = MakeSlot(observation, belief_, previous_action_, DeriveSeed(seed_, "act", row_));
  absl::StatusOr<planner::v1::ActResponse> answer = client_.Act(request, absl::Now() + patience_);
  if (!answer.ok()) return Annotate(answer.status(), "planner");
  const planner::v1::ActResponse& response = *answer;
  if (response.results_size() != 1 || response.results(0).action_size() != spec_.size) {
    return absl::InternalError(absl::StrFormat(
        "planner: answered %d slots with %d numbers, expected 1 with %d", response.results_size(),
        response.results_size() > 0 ? response.results(0).action_size() : 0, spec_.size));
  }
  row_ += 1;
  belief_ = response.results(0).belief();
  previous_action_.assign(response.results(0).action().begin(), response.results(0).action().end());
  version_ = std::max(version_, SnapshotVersion{response.snapshot_version().generation(),
                                                response.snapshot_version().counter()});
  return previous_action_;
}

absl::StatusOr<planner::v1::GetModelResponse> PlannerPolicy::Model() {
  absl::StatusOr<planner::v1::GetModelResponse> answer = client_.GetModel(model_, absl::Now() + patience_);
  if (!answer.ok()) return Annotate(answer.status(), "planner");
  return answer;
}

absl::StatusOr<std::vector<float>> BlindPolicy::Act(const ArrayMap& observation) {
  ArrayMap seen = observation;
  for (const std::string& name : hidden_) seen.erase(name);
  return policy_.Act(seen);
}

absl::StatusOr<Evaluation> Evaluate(Environment& environment, Policy& policy, int episodes, uint64_t seed) {
  Evaluation evaluation;
  for (int k = 0; k < episodes; ++k) {
    const uint64_t episode_seed = DeriveSeed(seed, "evaluation", static_cast<uint64_t>(k));
    policy.Begin(episode_seed);
    ASSIGN_OR_RETURN(TimeStep step, environment.Reset(episode_seed));
    double episode_return = 0;
    int64_t rows = 1;
    while (!step.is_last && !step.is_terminal) {
      ASSIGN_OR_RETURN(const std::vector<float> action, policy.Act(step.observation));
      ASSIGN_OR_RETURN(step, environment.Step(action));
      episode_return += step.reward;
      rows += 1;
    }
    evaluation.returns.push_back(episode_return);
    evaluation.rows.push_back(rows);
  }
  return evaluation;
}

double Mean(const std::vector<double>& values) {
  if (values.empty()) return 0;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double SampleDeviation(const std::vector<double>& values) {
  if (values.size() < 2) return 0;
  const double mean = Mean(values);
  double squares = 0;
  for (double value : values) squares += (value - mean) * (value - mean);
  return std::sqrt(squares / static_cast<double>(values.size() - 1));
}

}  // namespace orrery
