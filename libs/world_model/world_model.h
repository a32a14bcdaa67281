// The latent world model: encoders, latent dynamics, decoders, heads (docs/model.md gives formulas and sources).
//
// Shapes: T rows, B sequences, N = any leading batch, D deterministic (SSM: 0), S stochastic, E embedding, M modalities in the
// order of their names, A action. float32.
#pragma once

#include <torch/torch.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "libs/config/config.h"
#include "libs/world_model/latents.h"
#include "libs/world_model/parallel_rows.h"
#include "libs/world_model/rollout.h"

namespace orrery {

using TensorMap = std::map<std::string, torch::Tensor>;
// Uniform noise in [0, 1), float32, of the shape of the pictures that it is given ([N…, H, W, C]).
using PixelNoise = std::function<torch::Tensor(const torch::Tensor& pictures)>;

// Latent state of N agents.
struct LatentState {
  torch::Tensor deter;  // [N, D]
  torch::Tensor stoch;  // [N, S]
};

// What is expected after an action, before anything is seen.
struct Predicted {
  torch::Tensor deter;       // [N, D]
  LatentDistribution prior;  // [N, S]
};

// Encoded observations.
struct Embedding {
  torch::Tensor value;      // [N, E]: the modalities' embeddings in the order of their names, zeros for what is missing
  torch::Tensor available;  // [M, N] bool: what is there; undefined: everything
};

// A training batch on the model's device.
struct Batch {
  TensorMap observations;   // preprocessed, images [T, B, C, H, W] in [-0.5, 0.5], vectors [T, B, size]
  torch::Tensor action;     // [T, B, A]: led to row t
  torch::Tensor reward;     // [T, B]
  torch::Tensor is_first;   // [T, B] uint8
  torch::Tensor is_terminal = {};  // [T, B] uint8; needed with a continue head only
  TensorMap available = {};        // [T, B] uint8 by modality: it is there at this row; everywhere where there is no entry
};

// What the loss draws: standard normals, and uniform numbers in [0, 1).
struct LossNoise {
  torch::Tensor posterior;     // [T, B, S] normal
  torch::Tensor overshooting;  // [distance + 1, T, B, S] normal; [k, t]: k-th open-loop step that lands on row t. The larger
                               // of the configured distances; undefined when none is on
  torch::Tensor component = {};  // [T, B] uniform: chooses among a mixture's components; undefined for other posteriors
  torch::Tensor dropout = {};    // [T, B, M] uniform: below modality_dropout the modality is hidden; undefined: none is
};

// Everything the objective computes; names as in `orrery inspect loss`. Undefined: not computed.
struct LossOutputs {
  torch::Tensor deter, stoch;                            // [T, B, D], [T, B, S]
  torch::Tensor prior_mean, prior_std;                   // [T, B, S]; categorical: probabilities, and no std
  torch::Tensor post_mean, post_std;                     // [T, B, S]: of the component that was drawn
  torch::Tensor embed;                                   // [T, B, E]
  TensorMap recon;                                       // as the observations; symlog of vectors where configured
  torch::Tensor reward_mean;                             // [T, B]: what the head predicts, transformed as configured
  torch::Tensor continue_logit;                          // [T, B]
  torch::Tensor kl;                                      // [T, B], before free nats, mean over components
  torch::Tensor loss_observation, loss_reward, loss_kl;  // scalars; observation: with each modality's scale, the others unweighted
  torch::Tensor loss_overshooting, loss_observation_overshooting, loss_global_prior, loss_continue;  // scalars, unweighted
  torch::Tensor loss_total;                              // scalar, weighted
};

struct ReturnOptions {
  double discount = 1;          // of the k-th predicted reward: discount^k, k = 0 for the first
  bool terminal_value = false;  // adds discount^H times the value of the last state; needs model.behavior
};

// Standard normals that ImaginedReturns draws itself: those of state n from seeds[n] alone, others for every `draw`.
struct SeededNoise {
  absl::Span<const uint64_t> seeds;  // [N]
  uint32_t draw = 0;
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
  // ImaginedReturns with bfloat16 products: on the CPU by its kernels, where the processor has such dot products; on CUDA
  // always, and there the convolutions too, also those of Loss. Parameters stay float32. Call before anything else.
  void UseBfloat16();
  // Hash of names and shapes of all parameters.
  uint64_t StructureHash() const;
  // Which model this is, where each parameter lies, and how often it was changed: while this stays the same, what was computed
  // from the parameters holds.
  std::vector<std::pair<const void*, int64_t>> ParameterVersions() const;
  int deterministic_size() const;
  int stochastic_size() const;
  int action_size() const;

  // Zeros.
  LatentState InitialState(int64_t n) const;
  // Stored observations (images [N…, H, W, C] uint8, vectors float32) to what the encoder takes (images [N…, C, H, W]
  // float32): quantisation to `bits`, then uniform noise of one step (none: no noise, as 8 bits). On the device of what is given.
  TensorMap Preprocess(const TensorMap& stored, const PixelNoise& noise) const;
  // With fresh noise from `generator` (undefined: none), which must be on the device of what is given.
  TensorMap Preprocess(const TensorMap& stored, c10::optional<torch::Generator> generator) const;
  // Of preprocessed observations without time dimension ([N, C, H, W]). `available` [N] bool by modality; one without an
  // entry is there for all. A modality that is missing from `observations` is there for none; `n` is needed when all are.
  Embedding Encode(const TensorMap& observations, const TensorMap& available = {}, int64_t n = -1) const;
  // One step of the dynamics: state and action [N, A].
  Predicted Predict(const LatentState& state, const torch::Tensor& action) const;
  // The belief with which one acts: with experts the product of what is there (MOPOE_AVERAGED: their average). The prior where
  // nothing is there.
  LatentDistribution Posterior(const Predicted& predicted, const Embedding& embedding) const;
  const Latents& latents() const;
  // The head's mean of the reward as planning adds it up [N].
  torch::Tensor Reward(const LatentState& state) const;
  // Probability that the episode goes on [N]; ones without a continue head.
  torch::Tensor Continue(const LatentState& state) const;
  // With model.behavior only: what the actor's distribution is made of (behavior.h), [N, 2A] or [N, A] logits; the value [N].
  torch::Tensor ActorOutputs(const LatentState& state) const;
  torch::Tensor Value(const LatentState& state) const;
  // Reconstruction of every modality, images [N, C, H, W], vectors in their own units.
  TensorMap Decode(const LatentState& state) const;

  // The objective. `with_overshooting` also computes the term at scale 0 (inspect).
  LossOutputs Loss(const Batch& batch, const LossNoise& noise, bool with_overshooting) const;
  // Draws the noise that Loss needs.
  LossNoise DrawNoise(int64_t t, int64_t b, torch::Generator& generator, bool with_overshooting) const;
  // Sums [N, J] of the predicted rewards of J open-loop rollouts from each of N states: actions [H, N, J, A], standard
  // normals [H, N, J, S]. With a continue head each reward, and the terminal value, counts by the product of what it predicted
  // for the states before. Without gradient. Gaussian models with a GRU on the CPU by the kernels of rollout.h.
  torch::Tensor ImaginedReturns(const LatentState& start, const torch::Tensor& actions, const torch::Tensor& noise,
                                const ReturnOptions& options = {}) const;
  // The same with normals drawn on the way, which is faster than to give them. Only where DrawsNoise: by the kernels.
  torch::Tensor ImaginedReturns(const LatentState& start, const torch::Tensor& actions, const SeededNoise& noise,
                                const ReturnOptions& options = {}) const;
  bool DrawsNoise(const ReturnOptions& options = {}) const;

  // The weights that a kernel takes.
  std::unique_ptr<PackedModel> PackForRollouts(const RolloutKernel& kernel) const;

 private:
  struct Impl;
  explicit WorldModel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace orrery
