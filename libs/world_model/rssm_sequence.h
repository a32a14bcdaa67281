// The recurrence of the RSSM over a whole training sequence as one differentiable operation.
//
// At small sizes the cost of a sequence is the number of tensor operations, so everything that does not depend on the
// recurrence stays outside (embedding and action parts, priors), and the gradient is written by hand: activation slopes
// for all rows at once, one small product per layer and row, and each weight's gradient as one product over all rows.
#pragma once

#include <torch/torch.h>

#include <vector>

#include "libs/world_model/activation.h"

namespace orrery {

// Tensors of the recurrence; those marked * get gradients.
struct RssmSequenceInputs {
  torch::Tensor action_part;                 // * [T, B, U]: action's part of rssm.input, with its bias
  torch::Tensor embed_part;                  // * [T, B, U]: embedding's part of rssm.posterior.hidden, with its bias
  torch::Tensor state_weight;                // * [U, S]: state's part of rssm.input
  torch::Tensor weight_ih, bias_ih;          // * [3D, U], [3D]
  torch::Tensor weight_hh, bias_hh;          // * [3D, D], [3D]
  torch::Tensor deter_weight;                // * [U, D]: deterministic part of rssm.posterior.hidden
  torch::Tensor out_weight, out_bias;        // * [2S, U], [2S]: rssm.posterior.out
  torch::Tensor noise;                       // [T, B, S]
  torch::Tensor keep;                        // [T, B, 1]: 0 where the state is reset before the row, else 1
  std::vector<bool> resets;                  // row t resets some element's state (row 0 starts from zero anyway)
  Activation activation = config::v1::Model::RELU;
  double min_std = 0.1;
};

struct RssmSequenceOutputs {
  torch::Tensor deter;                 // [T, B, D]
  torch::Tensor stoch;                 // [T, B, S]
  torch::Tensor post_mean, post_std;   // [T, B, S]
};

RssmSequenceOutputs RunRssmSequence(const RssmSequenceInputs& inputs);

}  // namespace orrery
