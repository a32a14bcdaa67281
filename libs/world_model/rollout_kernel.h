// What the inner loops of a rollout need, as plain pointers (rollout.h has the owners).
#pragma once

#include <cstdint>

namespace orrery {

// Outputs of a layer that are stored together.
constexpr int kRolloutTile = 12;

enum class RolloutActivation { kRelu, kElu, kTanh, kSilu };

// weight [tile][input][output of the tile], bias [outputs, filled up to whole tiles]. An input is a word of four bytes: one
// float32, or two bfloat16, the first in the low half.
struct RolloutLayer {
  int64_t inputs = 0, outputs = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;
};

// Of [h | s]; the last layer has one output.
struct RolloutHead {
  const RolloutLayer* layers = nullptr;
  int64_t count = 0;  // 0: there is none
};

// A model with Gaussian RSSM latents: x = act(input [s | action]); h = GRU(x, h); s ~ prior(h); reward of [h | s].
struct RolloutModel {
  int64_t deter = 0, stoch = 0, hidden = 0, action = 0;
  int64_t widest = 0;  // of the layers' outputs
  float min_std = 0;
  RolloutActivation activation = RolloutActivation::kRelu;
  RolloutLayer input;                // [s | action]
  RolloutLayer reset_update;         // [x | h]: gates r and z
  RolloutLayer candidate_input;      // x
  RolloutLayer candidate_recurrent;  // h
  RolloutLayer prior_hidden, prior_out;
  RolloutHead reward;
  RolloutHead goes_on;  // logit of going on
};

// Row-major float32.
struct RolloutArrays {
  int64_t horizon = 0, agents = 0, candidates = 0;
  const float* deter = nullptr;    // [agents, D]
  const float* stoch = nullptr;    // [agents, S]
  const float* actions = nullptr;  // [horizon, agents, candidates, A]
  const float* noise = nullptr;    // [horizon, agents, candidates, S]: standard normals; null: drawn by the kernel
  const uint64_t* seeds = nullptr;  // [agents]: what the kernel draws from
  uint32_t draw = 0;                // which of a seed's draws
  float discount = 1;              // of the k-th reward: discount^k
  float* returns = nullptr;        // [agents, candidates]: sums of the predicted rewards, each times the chance of getting there
};

// Rows of scratch that a kernel needs; a row holds `rows` floats.
inline int64_t WorkRows(const RolloutModel& m) { return m.hidden + 6 * m.deter + 2 * m.stoch + 2 * m.action + 2 * m.widest; }

// One instruction set. roll_block computes candidates `begin` to `begin + rows`, at most `rows`, of one agent.
struct RolloutKernel {
  const char* name;
  int rows;
  int pair;  // features to a word: 1, float32, or 2, bfloat16
  void (*roll_block)(const RolloutModel& model, const RolloutArrays& arrays, int64_t agent, int64_t begin, int64_t rows,
                     float* work);
  // The normals that it draws at one step: to [count, rows].
  void (*draw_normals)(uint64_t seed, uint32_t draw, int64_t begin, int64_t step, int64_t count, float* to);
};

#if defined(__x86_64__)
extern const RolloutKernel kRolloutAvx512bf16, kRolloutAvx512, kRolloutAvx2;
#endif
extern const RolloutKernel kRolloutPortable;

}  // namespace orrery
