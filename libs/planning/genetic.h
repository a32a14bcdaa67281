// A genetic algorithm over plans, for any objective.
#pragma once

#include <torch/torch.h>

#include <utility>

#include "libs/config/config.h"
#include "libs/planning/plan_problem.h"

namespace orrery {

// Chances [N, P] of being chosen as a parent: (R - min R) / Σ(R - min R) of returns R [N, P], uniform where all are equal.
// A return that is not finite has none, unless none is finite: then all are equal.
torch::Tensor RouletteWeights(const torch::Tensor& returns);

// Two complementary children: where `coin` is true the first takes the first parent's gene and the second the second's,
// elsewhere the other way round. `coin` is broadcast.
std::pair<torch::Tensor, torch::Tensor> Crossover(const torch::Tensor& first, const torch::Tensor& second,
                                                  const torch::Tensor& coin);

// A population of plans, uniform at first. Each is scored by the mean return of `simulations` evaluations. The best, ties
// broken at random, goes on unchanged and is scored again; pairs of parents, drawn with replacement by RouletteWeights, give
// pairs of children by uniform crossover, whose genes then mutate. After the last generation the best plan is the answer and
// its return the predicted one. A gene is one number, mutated by Gaussian noise and clipped to [-1, 1]; discrete: one
// action, mutated to a uniformly drawn valid one. A score that is not finite counts as -inf; in a generation without a finite
// one an agent's answer stays what it was, at first 0 (discrete: uniform probabilities) with -inf.
PlanResult RunGenetic(const config::v1::Genetic& genetic, const PlanProblem& problem);

}  // namespace orrery
