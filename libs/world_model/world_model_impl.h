// Inside of WorldModel, shared by its source files; nobody else includes it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "libs/world_model/experts.h"
#include "libs/world_model/layers.h"
#include "libs/world_model/world_model.h"

namespace orrery {

struct ModalityNet {
  std::string name;
  bool is_image = false;
  config::v1::ImageModality image;
  config::v1::Variance variance = config::v1::UNIT;
  bool symlog = false;
  double scale = 1;
  int64_t begin = 0, embedding = 0;  // its part of the whole embedding
  std::vector<Layer> encoder;
  Layer decoder_input;              // images
  std::vector<Layer> deconvolutions;
  Mlp decoder;                      // vectors
  config::v1::Model::Activation decoder_activation = config::v1::Model::RELU;
  torch::Tensor raw_std;            // SHARED: one number
  Layer std;                        // PER_OUTPUT
};

// Mean of a likelihood, and its deviation where that is learned.
struct Likelihood {
  torch::Tensor mean, std;
};

// [N]; two-hot: logits [N, 255] beside their mean.
struct RewardPrediction {
  torch::Tensor mean, std, logits;
};

// Posterior from what is predicted and an embedding, or one modality's part of it.
struct Expert {
  Layer hidden, out;
  int64_t begin = 0, size = 0;  // of the embedding
};

// What training sees of a sequence.
struct Observed {
  torch::Tensor deter, stoch;  // [T, B, ·]
  LatentDistribution prior;    // [T, B, S]
  Mixture posterior;           // components [K, T, B, S], weight [K, T, B]
  LatentDistribution drawn;    // [T, B, S]: the component that was sampled
};

struct WorldModel::Impl {
  explicit Impl(const config::v1::Model& model);
  // Binds the networks to the parameters by name.
  void Bind(TensorMap named);
  torch::TensorOptions options() const { return prior_out.bias.options().requires_grad(false); }
  // As WorldModel::ParameterVersions.
  std::vector<std::pair<const void*, int64_t>> ParameterVersions() const;

  // Networks (world_model.cc).
  torch::Tensor EncodeOne(const ModalityNet& net, const torch::Tensor& x) const;
  Likelihood DecodeOne(const ModalityNet& net, const torch::Tensor& feature) const;
  // In what convolutions of x compute.
  at::ScalarType ConvolutionType(const torch::Tensor& x) const {
    return bfloat16 && x.is_cuda() ? at::kBFloat16 : x.scalar_type();
  }
  // `f` of all rows of x, by the workers where there are some and a gradient is wanted.
  torch::Tensor ByWorkers(const std::function<torch::Tensor(const torch::Tensor&)>& f, const torch::Tensor& x,
                          const std::vector<Layer>& layers) const;
  RewardPrediction PredictReward(const torch::Tensor& feature) const;
  // Probability of going on [N] of features [N, D + S]; with a continue head only.
  torch::Tensor ContinueOf(const torch::Tensor& feature) const {
    return at::sigmoid(continues.out(continues.Feature(activation, feature))).squeeze(-1);
  }
  torch::Tensor ValueOf(const torch::Tensor& feature) const;

  // Dynamics (dynamics.cc).
  bool ssm() const { return config.latent() == config::v1::Model::SSM; }
  // The layer that takes [s | a].
  const Layer& transition() const { return ssm() ? prior_hidden : input; }
  torch::Tensor state_weight() const { return transition().weight.narrow(1, 0, stoch); }
  torch::Tensor action_weight() const { return transition().weight.narrow(1, stoch, action_size); }
  // Action's part of that layer, with its bias.
  torch::Tensor ActionPart(const torch::Tensor& x) const { return at::linear(x, action_weight(), transition().bias); }
  Predicted PredictFrom(const torch::Tensor& action_part, const LatentState& state) const;
  LatentDistribution PriorOf(const torch::Tensor& deter) const;
  torch::Tensor Gru(const torch::Tensor& x, const torch::Tensor& h) const;
  // The embedding's part of an expert's hidden layer, with its bias.
  torch::Tensor EmbedPart(const Expert& expert, const torch::Tensor& embed) const;
  LatentDistribution ExpertFrom(const Expert& expert, const torch::Tensor& embed_part, const Predicted& predicted) const;
  // All experts [M, N, S] from their parts of the embedding.
  LatentDistribution Experts(const std::vector<torch::Tensor>& embed_parts, const Predicted& predicted) const;
  // The posterior of training from parts [N, U] and what is there [M, N] (undefined: everything).
  Mixture PosteriorMixture(const std::vector<torch::Tensor>& embed_parts, const torch::Tensor& available,
                           const Predicted& predicted) const;
  // A sequence: action part [T, B, U], embedding [T·B, E], available [M, T·B] or undefined, keep [T, B, 1].
  Observed Observe(const torch::Tensor& action_part, const Embedding& embedding, const torch::Tensor& first,
                   const torch::Tensor& keep, const LossNoise& noise) const;
  Observed ObserveFused(const torch::Tensor& action_part, const torch::Tensor& embed, const torch::Tensor& first,
                        const torch::Tensor& keep, const torch::Tensor& noise) const;
  Observed ObserveStepByStep(const torch::Tensor& action_part, const Embedding& embedding, const torch::Tensor& keep,
                             const LossNoise& noise) const;
  bool can_fuse() const;

  // Objective (objective.cc).
  TensorMap Available(const Batch& batch, const torch::Tensor& dropout) const;
  // Sum over the elements of each observation, mean over the rows [N] where it is there, weighted by modality.
  torch::Tensor ObservationLoss(const std::map<std::string, Likelihood>& recon, const TensorMap& flat,
                                const TensorMap& available) const;
  // Of each row: [N].
  torch::Tensor RewardLoss(const RewardPrediction& predicted, const torch::Tensor& given) const;
  void AddPredictions(const Batch& batch, const TensorMap& flat, const TensorMap& available, LossOutputs& out) const;
  torch::Tensor FreeNats(const torch::Tensor& kl, const torch::Tensor& weight) const;
  torch::Tensor KlLoss(const Observed& o, const torch::Tensor& kl) const;
  // `all`: also what has no weight.
  void AddOvershooting(const Batch& batch, const Observed& o, const torch::Tensor& action_part, const torch::Tensor& first,
                       const TensorMap& flat, const TensorMap& available, const torch::Tensor& noise, bool all,
                       LossOutputs& out) const;
  torch::Tensor DecodedLoss(const LatentState& state, const Batch& batch, int64_t k, const TensorMap& flat,
                            const TensorMap& available, const torch::Tensor& counts) const;
  void AddTotal(LossOutputs& out) const;

  // Rollouts (returns.cc).
  bool can_pack() const;
  torch::Tensor ReturnsByTorch(const LatentState& start, const torch::Tensor& actions, const torch::Tensor& noise,
                               const ReturnOptions& options) const;
  // `arrays` has the noise, or says how it is drawn.
  torch::Tensor ReturnsOnCpu(const LatentState& start, const torch::Tensor& actions, RolloutArrays arrays,
                             const ReturnOptions& options) const;
  // The weights as rollouts on the CPU take them, packed anew when a parameter has changed.
  std::shared_ptr<const PackedModel> Packed() const;
  // The networks with their weights in bfloat16, made anew when a parameter has changed.
  std::shared_ptr<const Impl> Lowered() const;
  std::unique_ptr<PackedModel> Pack(const RolloutKernel& kernel) const;
  // Forgets what was made of other parameters.
  void DropStale() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(packed_mu);

  const config::v1::Model config;
  const int64_t instance;  // no two models of a process have the same
  const Latents latents;
  const int64_t deter, stoch, action_size;
  const double min_std;
  const Activation activation, conv_activation;
  TensorMap parameters;
  std::vector<ModalityNet> modalities;
  uint64_t structure_hash = 0;

  Layer input, prior_hidden, prior_out;
  torch::Tensor gru_weight_ih, gru_weight_hh, gru_bias_ih, gru_bias_hh, gru_norm_weight, gru_norm_bias;
  std::vector<Expert> experts;  // one for the whole embedding, or one for each modality
  Mlp reward, continues, actor, value;
  torch::Tensor reward_raw_std;  // SHARED: one number; PER_OUTPUT: reward.raw_std
  std::shared_ptr<RowWorkers> workers;
  bool bfloat16 = false;

  mutable absl::Mutex packed_mu;
  mutable std::shared_ptr<const PackedModel> packed ABSL_GUARDED_BY(packed_mu);
  mutable std::shared_ptr<const Impl> lowered ABSL_GUARDED_BY(packed_mu);
  mutable std::vector<std::pair<const void*, int64_t>> packed_versions ABSL_GUARDED_BY(packed_mu);  // of what is there
};

}  // namespace orrery
