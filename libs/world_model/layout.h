// Names, shapes and initialisation of a model's parameters, from its configuration alone: a snapshot is checked against
// this before anything of its size is allocated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "libs/config/config.h"

namespace orrery {

struct ParameterSpec {
  std::string name;  // "encoder.image.conv1.weight"
  std::vector<int64_t> shape;
  double bound;  // initialised uniformly in [center - bound, center + bound]
  double center = 0;
};

// Modalities in the order of their names: the order of embeddings and of parameters.
std::vector<config::v1::Modality> ModalitiesByName(const config::v1::Model& model);
// Convolutions (and transposed ones) of an image: as many of kernel 4 and stride 2 as its side allows. 3 at 32, 4 at 64 and
// 84, 5 at 96 and 128.
int ImageLayers(const config::v1::ImageModality& image);
// Length of a modality's embedding. Images: depth · 2^(layers-1) channels of what is left of the sides (32 · depth at 64×64,
// 16 · depth at 32×32), which is also the number of channels that the decoder starts from at 1×1. Vectors: width of the last
// layer.
int64_t EmbeddingSize(const config::v1::Modality& modality);
int DecoderLayers(const config::v1::VectorModality& vector);
int64_t DecoderWidth(const config::v1::VectorModality& vector);
// Length of the stochastic state: stochastic_size, or groups · classes.
int64_t StochasticSize(const config::v1::Model& model);
// Length of the deterministic state; SSM: 0.
int64_t DeterministicSize(const config::v1::Model& model);
// Whether every modality has an expert of its own.
bool HasExperts(const config::v1::Model& model);
// Whether the posterior is a mixture of several components.
bool HasMixture(const config::v1::Model& model);
// Open-loop steps that the loss takes; `all`: also where the weight is 0 (inspect). 0: none.
int64_t OvershootingDistance(const config::v1::Model& model, bool all);
// Number of bins of a two-hot head.
constexpr int64_t kTwoHotBins = 255;
// Every parameter; the model must be valid and complete.
std::vector<ParameterSpec> ParameterLayout(const config::v1::Model& model);

}  // namespace orrery
