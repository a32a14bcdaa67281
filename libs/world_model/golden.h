// Helpers for tests only: the golden files of tests/golden, made by a plain PyTorch statement of docs/model.md.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "libs/base/testing.h"
#include "libs/tensors/safetensors.h"
#include "libs/world_model/world_model.h"

namespace orrery {

struct Golden {
  SafeTensors file;
  config::v1::Model config;
  config::v1::Planner planner;
  std::shared_ptr<WorldModel> model;

  const torch::Tensor& operator[](const std::string& name) const { return file.tensors.at(name); }
  int number(const std::string& key) const { return std::stoi(file.metadata.at(key)); }
  Batch batch() const {
    return {{{"image", (*this)["batch/image"]}}, (*this)["batch/action"], (*this)["batch/reward"], (*this)["batch/is_first"]};
  }
  LossNoise noise() const { return {(*this)["noise/posterior"], (*this)["noise/overshooting"]}; }
};

inline config::v1::Model GoldenConfig(const std::map<std::string, std::string>& metadata) {
  const auto value = [&](const std::string& key) { return metadata.at(key); };
  auto config = ParseModel(absl::StrCat(
      "deterministic_size: ", value("D"), " stochastic_size: ", value("S"), " hidden_size: ", value("U"),
      " activation: ", absl::AsciiStrToUpper(value("activation")),
      " conv_activation: ", absl::AsciiStrToUpper(value("conv_activation")), " min_std: ", value("min_std"),
      " action { continuous { size: ", value("A"), " } }",
      " modalities { name: 'image' image { height: 64 width: 64 depth: ", value("depth"), " } }",
      " reward { layers: ", value("reward_layers"), " hidden_size: ", value("reward_hidden"), " }",
      " objective { free_nats: ", value("free_nats"), " reward_scale: ", value("reward_scale"),
      " kl_scale: ", value("kl_scale"), " overshooting { distance: ", value("distance"), " } }"));
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

// `name`: "planet" or "planet_elu". The model has the file's weights.
inline Golden LoadGolden(const std::string& name) {
  Golden golden;
  auto file = LoadSafeTensors(SourceFile("tests/golden/golden_" + name + ".safetensors"));
  EXPECT_TRUE(file.ok()) << file.status();
  golden.file = *std::move(file);
  golden.config = GoldenConfig(golden.file.metadata);
  auto& cem = *golden.planner.mutable_cem();
  cem.set_horizon(golden.number("H"));
  cem.set_iterations(golden.number("I"));
  cem.set_candidates(golden.number("J"));
  cem.set_elites(golden.number("top"));
  auto model = WorldModel::Create(golden.config, 0);
  EXPECT_TRUE(model.ok()) << model.status();
  golden.model = *std::move(model);
  torch::NoGradGuard no_grad;
  size_t weights = 0;
  for (auto& parameter : golden.model->named_parameters()) parameter.value().copy_(golden["weight/" + parameter.key()]);
  for (const auto& entry : golden.file.tensors) weights += absl::StartsWith(entry.first, "weight/");
  EXPECT_EQ(weights, golden.model->named_parameters().size());
  return golden;
}

// Largest difference at most `tolerance` times the largest magnitude expected.
inline ::testing::AssertionResult Near(const torch::Tensor& actual, const torch::Tensor& expected,
                                       double tolerance = 1e-4) {
  if (!actual.defined()) return ::testing::AssertionFailure() << "undefined";
  if (actual.sizes() != expected.sizes())
    return ::testing::AssertionFailure() << "shape " << actual.sizes() << ", expected " << expected.sizes();
  const double difference = (actual - expected).abs().max().item<double>(), scale = expected.abs().max().item<double>();
  if (difference <= tolerance * scale) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "differs by " << difference << " where the largest magnitude is " << scale;
}

// The gradient of `loss` by every parameter (double precision) against differences, at one element each.
inline void ExpectFiniteDifferences(const torch::OrderedDict<std::string, torch::Tensor>& parameters,
                                    const std::function<torch::Tensor()>& loss) {
  const auto gradients = torch::autograd::grad({loss()}, parameters.values(), {}, c10::nullopt, false, /*allow_unused=*/true);
  torch::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters.size(); ++i) {
    torch::Tensor flat = parameters[i].value().view(-1);
    const int64_t at = flat.numel() / 2;
    const double x = flat[at].item<double>(), h = 1e-5;
    flat[at] = x + h;
    const double up = loss().item<double>();
    flat[at] = x - h;
    const double down = loss().item<double>();
    flat[at] = x;
    const double slope = gradients[i].defined() ? gradients[i].reshape(-1)[at].item<double>() : 0;
    EXPECT_NEAR(slope, (up - down) / (2 * h), 1e-6 + 1e-5 * std::abs(slope)) << parameters[i].key();
  }
}

}  // namespace orrery
