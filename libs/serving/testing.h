// Small models and observations for tests of serving.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "libs/base/array.h"
#include "libs/base/random.h"
#include "libs/config/config.h"
#include "libs/world_model/snapshot.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// A picture of 32×32 and a vector of three; two actions.
inline config::v1::Model TinyModel(int deterministic_size = 16) {
  config::v1::Model model;
  model.set_deterministic_size(deterministic_size);
  model.set_stochastic_size(4);
  model.set_hidden_size(16);
  model.mutable_action()->mutable_continuous()->set_size(2);
  config::v1::Modality& image = *model.add_modalities();
  image.set_name("image");
  image.mutable_image()->set_height(32);
  image.mutable_image()->set_width(32);
  image.mutable_image()->set_depth(2);
  config::v1::Modality& joints = *model.add_modalities();
  joints.set_name("joints");
  joints.mutable_vector()->set_size(3);
  joints.mutable_vector()->set_hidden_size(8);
  model.mutable_reward()->set_layers(1);
  model.mutable_reward()->set_hidden_size(8);
  return model;
}

inline config::v1::Planner TinyPlanner() {
  config::v1::Planner planner;
  planner.mutable_cem()->set_horizon(4);
  planner.mutable_cem()->set_iterations(3);
  planner.mutable_cem()->set_candidates(64);
  planner.mutable_cem()->set_elites(8);
  return planner;
}

// TinyModel with three choices instead of two numbers.
inline config::v1::Model TinyDiscreteModel() {
  config::v1::Model model = TinyModel();
  model.mutable_action()->mutable_discrete()->set_size(3);
  return model;
}

// A whole snapshot file with parameters drawn from `seed`.
inline std::string TinySnapshot(int64_t counter, uint64_t seed = 1, const config::v1::Model& model = TinyModel(),
                                const config::v1::Planner& planner = TinyPlanner()) {
  SnapshotInfo info;
  info.model = model;
  info.planner = planner;
  info.run = "tiny";
  info.generation = 1;
  info.counter = counter;
  return *SerializeSnapshot(**WorldModel::Create(model, seed), info);
}

// An observation that fits TinyModel, other for every seed.
inline ArrayMap TinyObservation(uint64_t seed) {
  Array image = Array::Zeros(DType::kUInt8, {32, 32, 3});
  for (size_t i = 0; i < image.bytes.size(); ++i) image.bytes[i] = static_cast<char>(DeriveSeed(seed, "pixel", i));
  const float x = static_cast<float>(seed % 100);
  const std::vector<float> joints = {x / 50 - 1, 0.5f, -x / 100};
  return {{"image", std::move(image)}, {"joints", Array::From<float>(joints, {3})}};
}

}  // namespace orrery
