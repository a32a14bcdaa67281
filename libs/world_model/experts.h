// Joining one Gaussian expert a modality to one posterior (Wu and Goodman 2018; Sutter et al. 2021, MoPoE).
#pragma once

#include <torch/torch.h>

#include <vector>

#include "libs/config/config.h"
#include "libs/world_model/latents.h"

namespace orrery {

// K components; where a weight is 0 the component's numbers mean nothing but are finite.
struct Mixture {
  LatentDistribution components;  // [K, N, S]
  torch::Tensor weight;           // [K, N]: the same for all components that count, their sum 1
};

// Sets of modalities, as bit masks over their order, that the posterior mixes. MOPOE_AVERAGED: as MOPOE, before averaging.
std::vector<unsigned> Subsets(config::v1::Model::Posterior posterior, int modalities);

// experts [M, N, S]; available [M, N] bool. A modality that is not there counts in no subset; elements with none get `prior`
// ([N, S]) as their only component. POE's one component is the product of what is there.
Mixture JoinExperts(config::v1::Model::Posterior posterior, const LatentDistribution& experts, const torch::Tensor& available,
                    const LatentDistribution& prior);

// The product of everything that is there: what acting uses. Shapes as above; [N, S].
LatentDistribution ProductOfExperts(const LatentDistribution& experts, const torch::Tensor& available,
                                    const LatentDistribution& prior);

// One component for each element: `uniform` [N] in [0, 1) chooses among those that count.
LatentDistribution DrawComponent(const Mixture& mixture, const torch::Tensor& uniform);

}  // namespace orrery
