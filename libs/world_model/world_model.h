// The latent world model: encoders, RSSM, decoders, reward head (docs/model.md gives formulas and sources).
//
// Shapes: T rows, B sequences, N = any leading batch, D deterministic, S stochastic, E embedding, A action. float32.
#pragma once

#include <torch/torch.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/config/config.h"
#include "libs/world_model/parallel_rows.h"
#include "libs/world_model/rollout.h"

namespace orrery {

using TensorMap = std::map<std::string, torch::Tensor>;

// Diagonal Gaussian.
struct Gaussian {
  torch::Tensor mean;  // [N, S]
  torch::Tensor std;   // [N, S]
};

// Latent state of N agents.
struct LatentState {
  torch::Tensor deter;  // [N, D]
  torch::Tensor stoch;  // [N, S]
};

// A training batch on the model's device.
struct Batch {
  TensorMap observations;   // preprocessed, images [T, B, C, H, W] in [-0.5, 0.5], vectors [T, B, size]
  torch::Tensor action;     // [T, B, A]: led to row t
  torch::Tensor reward;     // [T, B]
  torch::Tensor is_first;   // [T, B] uint8
};

// Standard normals that the loss consumes. Undefined `overshooting` when the configured distance is below 2.
struct LossNoise {
  torch::Tensor posterior;     // [T, B, S]
  torch::Tensor overshooting;  // [distance + 1, T, B, S]; [k, t]: k-th open-loop step that lands on row t
};

// Everything the objective computes; names as in `orrery inspect loss`.
struct LossOutputs {
  torch::Tensor deter, stoch;                            // [T, B, D], [T, B, S]
  torch::Tensor prior_mean, prior_std;                   // [T, B, S]
  torch::Tensor post_mean, post_std;                     // [T, B, S]
  torch::Tensor embed;                                   // [T, B, E]
  TensorMap recon;                                       // as the observations
  torch::Tensor reward_mean;                             // [T, B]
  torch::Tensor kl;                                      // [T, B], before free nats
  torch::Tensor loss_observation, loss_reward, loss_kl;  // scalars; observation: with each modality's scale, the others unweighted
  torch::Tensor loss_overshooting;                       // scalar; undefined when not computed
  torch::Tensor loss_total;                              // scalar, weighted
};

// Not thread-safe while parameters change; const calls under torch::NoGradGuard or InferenceMode may run side by side.
class WorldModel : public torch::nn::Module {
 public:
  // `config` must be complete (action and modalities set). Initialises like torch's layers, from `seed`.
  static absl::StatusOr<std::shared_ptr<WorldModel>> Create(const config::v1::Model& config, uint64_t seed);
  ~WorldModel() override;

  const config::v1::Model& config() const;
  // On the CPU these share ImaginedReturns, and the convolutions of Loss and of its gradient, which are then computed in slices
  // of the batch: the result does not depend on the number of threads, and a gradient can be taken only once. Call before
  // anything else.
  void UseWorkers(std::shared_ptr<RowWorkers> workers);
  // ImaginedReturns on the CPU with bfloat16 dot products where the processor has them. Call before anything else.
  void UseBfloat16();
  // Hash of names and shapes of all parameters.
  uint64_t StructureHash() const;
  int deterministic_size() const;
  int stochastic_size() const;
  int action_size() const;

  // Zeros.
  LatentState InitialState(int64_t n) const;
  // Stored observations (images [N…, H, W, C] uint8, vectors float32) to what the encoder takes (images [N…, C, H, W]
  // float32): quantisation to `bits` with fresh uniform noise from `generator` (undefined: no noise, as 8 bits).
  TensorMap Preprocess(const TensorMap& stored, c10::optional<torch::Generator> generator) const;
  // Embedding [N, E] of preprocessed observations without time dimension ([N, C, H, W]), modalities in the order of their
  // names. One that is missing counts as zeros; at least one must be there.
  torch::Tensor Encode(const TensorMap& observations) const;
  // Deterministic part of one step: [N, D] from state and action [N, A].
  torch::Tensor Transition(const LatentState& state, const torch::Tensor& action) const;
  Gaussian Prior(const torch::Tensor& deter) const;
  Gaussian Posterior(const torch::Tensor& deter, const torch::Tensor& embed) const;
  // Mean of the reward [N].
  torch::Tensor Reward(const LatentState& state) const;
  // Reconstruction of every modality, images [N, C, H, W].
  TensorMap Decode(const LatentState& state) const;

  // The objective. `with_overshooting` also computes the term at scale 0 (inspect).
  LossOutputs Loss(const Batch& batch, const LossNoise& noise, bool with_overshooting) const;
  // Draws the noise that Loss needs.
  LossNoise DrawNoise(int64_t t, int64_t b, torch::Generator& generator, bool with_overshooting) const;
  // Sums [N, J] of the predicted rewards of J open-loop rollouts from each of N states: actions [H, N, J, A], standard
  // normals [H, N, J, S]. Without gradient.
  // On the CPU by the kernels of rollout.h.
  torch::Tensor ImaginedReturns(const LatentState& start, const torch::Tensor& actions, const torch::Tensor& noise) const;

  // The weights that a kernel takes.
  std::unique_ptr<PackedModel> PackForRollouts(const RolloutKernel& kernel) const;

 private:
  struct Impl;
  explicit WorldModel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace orrery
