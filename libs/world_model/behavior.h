// Actor and value learned in imagination (Dreamer: Hafner et al. 2020, arXiv 1912.01603).
#pragma once

#include <torch/torch.h>

#include "libs/world_model/world_model.h"

namespace orrery {

// Drawn actions of N states.
struct ActionSample {
  torch::Tensor action;    // [N, A] in [-1, 1], differentiable; discrete: one-hot, straight-through
  torch::Tensor log_prob;  // [N] of the action as a constant
  torch::Tensor entropy;   // [N] in nats; continuous: estimated from the sample
};

// From WorldModel::ActorOutputs and standard normals [N, A]. Continuous: tanh of a Gaussian with mean 5 tanh(x / 5) and deviation
// softplus(raw + init) + 1e-4, where softplus(init) = behavior.init_std. Discrete: categorical.
ActionSample SampleAction(const config::v1::Model& model, const torch::Tensor& outputs, const torch::Tensor& noise);
// tanh of the mean; discrete: the most probable choice, one-hot. [N, A].
torch::Tensor ModeAction(const config::v1::Model& model, const torch::Tensor& outputs);

// reward, value, proceed [H, …]: of the state after step t; bootstrap […]: value of the last one.
// G_t = r_t + c_t ((1 - λ) v_t + λ G_{t+1}), G_H = bootstrap. [H, …].
torch::Tensor LambdaReturns(const torch::Tensor& reward, const torch::Tensor& value, const torch::Tensor& proceed,
                            const torch::Tensor& bootstrap, double lambda);

// Standard normals.
struct BehaviorNoise {
  torch::Tensor action;  // [H, N, A]
  torch::Tensor state;   // [H, N, S]
};
BehaviorNoise DrawBehaviorNoise(const WorldModel& model, int64_t n, torch::Generator& generator);

struct BehaviorOutputs {
  torch::Tensor returns;      // [H, N]: λ-returns from each step
  torch::Tensor values;       // [H, N]: of the states before each step
  torch::Tensor entropy;      // [H, N]
  torch::Tensor loss_actor;   // scalar; differentiate by the actor's parameters only
  torch::Tensor loss_value;   // scalar; by the value's only
};

// Imagines behavior.horizon steps from N states, which are taken as constants.
BehaviorOutputs ImagineBehavior(const WorldModel& model, const LatentState& start, const BehaviorNoise& noise);

}  // namespace orrery
