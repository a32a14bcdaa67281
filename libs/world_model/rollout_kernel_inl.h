// The inner loops of rollout.h, compiled once per instruction set: each rollout_*.cc says how wide its vectors are and
// includes this file. Everything is in an unnamed namespace, so that the linker cannot mix the variants.
//
// A block of candidates lies across the lanes of the vectors: feature k of a block is one row of kRows floats. A layer is
// then a sum of rows, each multiplied by one broadcast weight, and everything after it is element by element.
//
// Includes nothing with inline functions of its own beyond these: a copy compiled for a newer processor must not end up in
// what older ones run.
#include <cstdint>
#include <cstring>
#ifdef ORRERY_BFLOAT16
#include <immintrin.h>
#endif

#include "libs/world_model/rollout_kernel.h"

namespace orrery {
namespace {

constexpr int kLanes = ORRERY_LANES;
constexpr int kTile = kRolloutTile;
constexpr int kPart = ORRERY_PART;      // outputs of a tile computed together: as many as there are registers for
constexpr int kVectors = 2;             // vectors to a row
constexpr int kRows = kLanes * kVectors;  // candidates of a block

#define ORRERY_INLINE inline __attribute__((always_inline))
#define ORRERY_LAMBDA __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Int __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));

ORRERY_INLINE Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ORRERY_INLINE void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
ORRERY_INLINE Vec Fill(float x) { return x - Vec{}; }
ORRERY_INLINE Bits FillBits(uint32_t x) { return x - Bits{}; }

#ifdef ORRERY_BFLOAT16
// Two features in a word of four bytes, the even one in the low half; products are summed in float32.
constexpr int kPair = 2;
typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef uint32_t Word __attribute__((vector_size(kLanes * sizeof(uint32_t))));
ORRERY_INLINE Word ToHalf(Vec x) { return __builtin_convertvector((Half)_mm512_cvtneps_pbh((__m512)x), Word); }
ORRERY_INLINE Vec Round(Vec even, Vec odd) { return (Vec)(ToHalf(even) | ToHalf(odd) << 16); }
ORRERY_INLINE Vec MultiplyAdd(Vec sum, Vec in, const float* weight) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)in, (__m512bh)(__m512i)Fill(*weight));
}
#else
constexpr int kPair = 1;
ORRERY_INLINE Vec MultiplyAdd(Vec sum, Vec in, const float* weight) { return sum + *weight * in; }
#endif
ORRERY_INLINE Vec Max(Vec a, Vec b) { return b > a ? b : a; }  // a where b is not a number
ORRERY_INLINE Vec Min(Vec a, Vec b) { return b < a ? b : a; }

// exp(x) with a relative error of about 1e-7; x is cut to [-87, 88].
ORRERY_INLINE Vec Exp(Vec x) {
  x = Max(Min(x, Fill(88.0f)), Fill(-87.0f));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number in the low bits
  const Vec n = (x * 1.44269504f + kRound) - kRound;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = Fill(1.9875691500e-4f);  // Cephes' polynomial for |r| <= ln(2) / 2
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Int exponent = (__builtin_convertvector(n, Int) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
}

// log(1 + x) for x in [-0.3, 1], with an absolute error of about 1e-7: twice the artanh of x / (x + 2).
ORRERY_INLINE Vec Log1p(Vec x) {
  const Vec t = x / (x + 2.0f), t2 = t * t;
  Vec p = Fill(2.0f / 13);
  p = p * t2 + 2.0f / 11;
  p = p * t2 + 2.0f / 9;
  p = p * t2 + 2.0f / 7;
  p = p * t2 + 2.0f / 5;
  p = p * t2 + 2.0f / 3;
  p = p * t2 + 2.0f;
  return p * t;
}

ORRERY_INLINE Vec Sigmoid(Vec x) { return 1.0f / (1.0f + Exp(-x)); }
ORRERY_INLINE Vec Tanh(Vec x) { return 1.0f - 2.0f / (1.0f + Exp(2.0f * x)); }
ORRERY_INLINE Vec Softplus(Vec x) { return Max(x, Vec{}) + Log1p(Exp(x > 0.0f ? -x : x)); }

// Both sigmoids with one division; below -40 they stay at that of -40, below 1e-17.
ORRERY_INLINE void Sigmoids(Vec& a, Vec& b) {
  const Vec p = 1.0f + Exp(Min(-a, Fill(40.0f))), q = 1.0f + Exp(Min(-b, Fill(40.0f)));
  const Vec inverse = 1.0f / (p * q);
  a = inverse * q;
  b = inverse * p;
}

// log(x) for x in (0, 1].
ORRERY_INLINE Vec Log(Vec x) {
  constexpr int32_t kRootOfHalf = 0x3f3504f3;  // the bits of sqrt(1 / 2)
  const Int exponent = ((Int)x - kRootOfHalf) >> 23;
  const Vec fraction = (Vec)((Int)x - (exponent << 23));  // in [sqrt(1 / 2), sqrt(2))
  return __builtin_convertvector(exponent, Vec) * 0.693147181f + Log1p(fraction - 1.0f);
}

// Of x >= 0, also of -0. By Newton's iteration for 1 / sqrt(x), from a guess by the exponent.
ORRERY_INLINE Vec Sqrt(Vec x) {
  Vec root = (Vec)(0x5f3759dfu - ((Bits)x >> 1));
  for (int i = 0; i < 3; ++i) root = root * (1.5f - 0.5f * x * root * root);
  return x * root;
}

// Sine and cosine of 2 pi x for x in [0, 1]: Taylor's series within a quadrant.
ORRERY_INLINE void SineCosine(Vec x, Vec& sine, Vec& cosine) {
  constexpr float kRound = 12582912.0f;  // as in Exp
  const Vec nearest = (4.0f * x + kRound) - kRound, y = (4.0f * x - nearest) * 1.57079633f, y2 = y * y;
  const Vec s = y + y * y2 * (-1.0f / 6 + y2 * (1.0f / 120 + y2 * (-1.0f / 5040 + y2 * (1.0f / 362880))));
  const Vec c = 1.0f + y2 * (-0.5f + y2 * (1.0f / 24 + y2 * (-1.0f / 720 + y2 * (1.0f / 40320))));
  const Int quadrant = __builtin_convertvector(nearest, Int);
  const Vec over = (quadrant & 1) != 0 ? c : s, across = (quadrant & 1) != 0 ? s : c;
  sine = (quadrant & 2) != 0 ? -over : over;
  cosine = ((quadrant + 1) & 2) != 0 ? -across : across;
}

// In place: counters to random words, by Threefry-4x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", 2011).
ORRERY_INLINE void Threefry(const uint32_t (&key)[4], Bits (&x)[4]) {
  constexpr int kRotations[8][2] = {{10, 26}, {11, 21}, {13, 27}, {23, 5}, {6, 20}, {17, 11}, {25, 10}, {18, 20}};
  const uint32_t keys[5] = {key[0], key[1], key[2], key[3], 0x1bd11bda ^ key[0] ^ key[1] ^ key[2] ^ key[3]};
  const auto rotate = [](Bits bits, int by) ORRERY_LAMBDA { return bits << by | bits >> (32 - by); };
  for (int i = 0; i < 4; ++i) x[i] += keys[i];
#pragma GCC unroll 20
  for (int round = 0; round < 20; ++round) {
    const int odd = round % 2 == 0 ? 1 : 3, other = 4 - odd;
    x[0] += x[odd];
    x[odd] = rotate(x[odd], kRotations[round % 8][0]) ^ x[0];
    x[2] += x[other];
    x[other] = rotate(x[other], kRotations[round % 8][1]) ^ x[2];
    if (round % 4 != 3) continue;
    for (int i = 0; i < 4; ++i) x[i] += keys[(round / 4 + 1 + i) % 5];
    x[3] += static_cast<uint32_t>(round / 4 + 1);
  }
}

// Two standard normals of two random words (Box and Muller 1958). Words have 24 bits here, so that none is above 5.8.
ORRERY_INLINE void ToNormals(Bits u, Bits v, Vec& first, Vec& second) {
  const auto uniform = [](Bits bits) ORRERY_LAMBDA { return __builtin_convertvector((Int)(bits >> 8), Vec) * 0x1p-24f; };
  const Vec radius = Sqrt(-2.0f * Log(uniform(u) + 0x1p-24f));
  SineCosine(uniform(v), second, first);
  first *= radius;
  second *= radius;
}

// Standard normals of `count` features of the candidates `begin` to begin + kRows at one step. Each depends on its candidate,
// step and feature, the seed and the draw alone.
void DrawNormals(uint64_t seed, uint32_t draw, int64_t begin, int64_t step, int64_t count, float* to) {
  const uint32_t key[4] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
  for (int v = 0; v < kRows; v += kLanes) {
    Bits candidate;
    for (int lane = 0; lane < kLanes; ++lane) candidate[lane] = static_cast<uint32_t>(begin + v + lane);
    for (int64_t i = 0; i < count; i += 4) {
      Bits x[4] = {candidate, FillBits(static_cast<uint32_t>(step)), FillBits(static_cast<uint32_t>(i / 4)), FillBits(draw)};
      Threefry(key, x);
      Vec normals[4];
      ToNormals(x[0], x[1], normals[0], normals[1]);
      ToNormals(x[2], x[3], normals[2], normals[3]);
      for (int k = 0; k < 4 && i + k < count; ++k) Store(to + (i + k) * kRows + v, normals[k]);
    }
  }
}

// How features are given to a layer: rows of kRows words, kPair features each; an odd last one has a zero beside it.
template <typename Function>
ORRERY_INLINE void Put(const float* from, int64_t count, float* to, const Function& f) {
  for (int64_t i = 0; i < count; i += kPair, from += kPair * kRows, to += kRows) {
    for (int v = 0; v < kRows; v += kLanes) {
#ifdef ORRERY_BFLOAT16
      Store(to + v, Round(f(Load(from + v)), i + 1 < count ? f(Load(from + kRows + v)) : Vec{}));
#else
      Store(to + v, f(Load(from + v)));
#endif
    }
  }
}

void Put(const float* from, int64_t count, float* to) {
  Put(from, count, to, [](Vec x) ORRERY_LAMBDA { return x; });
}

void PutActivated(RolloutActivation activation, const float* from, int64_t count, float* to) {
  switch (activation) {
    case RolloutActivation::kElu:
      return Put(from, count, to, [](Vec x) ORRERY_LAMBDA { return x > 0.0f ? x : Exp(x) - 1.0f; });
    case RolloutActivation::kTanh: return Put(from, count, to, [](Vec x) ORRERY_LAMBDA { return Tanh(x); });
    case RolloutActivation::kSilu: return Put(from, count, to, [](Vec x) ORRERY_LAMBDA { return x * Sigmoid(x); });
    case RolloutActivation::kRelu:  // keeps what is not a number
      return Put(from, count, to, [](Vec x) ORRERY_LAMBDA { return x < 0.0f ? Vec{} : x; });
  }
}

// Outputs `first` to first + part - 1 of a layer, all of one tile; those beyond the last one are not stored.
template <int part>
ORRERY_INLINE void ApplyPart(const RolloutLayer& layer, int64_t first, const float* x, float* y) {
  const float* weight = layer.weight + first / kTile * kTile * layer.inputs + first % kTile;
  Vec sum[part][kVectors];
  for (int n = 0; n < part; ++n)
    for (int v = 0; v < kVectors; ++v) sum[n][v] = Fill(layer.bias[first + n]);
  for (int64_t k = 0; k < layer.inputs; ++k) {
    Vec in[kVectors];
    for (int v = 0; v < kVectors; ++v) in[v] = Load(x + k * kRows + v * kLanes);
#pragma GCC unroll 12
    for (int n = 0; n < part; ++n)
      for (int v = 0; v < kVectors; ++v) sum[n][v] = MultiplyAdd(sum[n][v], in[v], weight + k * kTile + n);
  }
#pragma GCC unroll 12
  for (int n = 0; n < part; ++n) {
    if (first + n >= layer.outputs) break;
    for (int v = 0; v < kVectors; ++v) Store(y + (first + n) * kRows + v * kLanes, sum[n][v]);
  }
}

// y[n] = bias[n] + sum over k of weight[n][k] x[k]: features in, rows of kRows floats out. A third or two of a part are enough for
// the last few outputs.
void Apply(const RolloutLayer& layer, const float* x, float* y) {
  constexpr int kThird = kPart / 3;
  static_assert(kPart % 3 == 0);
  int64_t first = 0;
  for (; layer.outputs - first > 2 * kThird; first += kPart) ApplyPart<kPart>(layer, first, x, y);
  if (layer.outputs - first > kThird) {
    ApplyPart<2 * kThird>(layer, first, x, y);
  } else if (layer.outputs > first) {
    ApplyPart<kThird>(layer, first, x, y);
  }
}

// Rows [rows, width] of at most kRows candidates to `width` rows of lanes; missing candidates are zeros.
void Transpose(const float* from, int64_t rows, int64_t width, float* to) {
  if (rows < kRows) std::memset(to, 0, sizeof(float) * static_cast<size_t>(width * kRows));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < width; ++k) to[k * kRows + r] = from[r * width + k];
}

// In place: h = n + z (h - n), n = tanh(input + r * recurrent), with r and z the sigmoids of `reset_update`.
void Gates(const float* reset_update, const float* input, const float* recurrent, int64_t d, float* h) {
  for (int64_t i = 0; i < d * kRows; i += kLanes) {
    Vec r = Load(reset_update + i), z = Load(reset_update + d * kRows + i);
    Sigmoids(r, z);
    const Vec n = Tanh(Load(input + i) + r * Load(recurrent + i));
    Store(h + i, n + z * (Load(h + i) - n));
  }
}

// s = mean + (softplus(raw) + min_std) noise, in place of the noise.
void Sample(const float* mean_raw, float min_std, int64_t size, float* noise) {
  for (int64_t i = 0; i < size * kRows; i += kLanes) {
    const Vec std = Softplus(Load(mean_raw + size * kRows + i)) + min_std;
    Store(noise + i, Load(mean_raw + i) + std * Load(noise + i));
  }
}

// A head's output to the first row of `raw`.
void ApplyHead(const RolloutModel& m, const RolloutHead& head, const float* features, float* inner, float* raw) {
  for (int64_t i = 0; i < head.count; ++i) {
    Apply(head.layers[i], i == 0 ? features : inner, raw);
    if (i + 1 < head.count) PutActivated(m.activation, raw, head.layers[i].outputs, inner);
  }
}

// One block: candidates `begin` to `begin + rows` of one agent. `work` begins with the features x, h, s and action, one after
// another, so that [x | h], [h | s] and [s | action] are each the input of a layer.
void RollBlock(const RolloutModel& m, const RolloutArrays& arrays, int64_t agent, int64_t begin, int64_t rows, float* work) {
  const auto words = [](int64_t features) { return (features + kPair - 1) / kPair * kRows; };
  const int64_t row = agent * arrays.candidates + begin, all = arrays.agents * arrays.candidates;
  float* const x = work;
  float* const h = x + words(m.hidden);
  float* const s = h + words(m.deter);
  float* const action = s + words(m.stoch);
  float* const inner = action + words(m.action);
  float* const state = inner + m.widest * kRows;      // h in float32
  float* const given = state + m.deter * kRows;       // action, then noise and sample
  float* const raw = given + (m.stoch + m.action) * kRows;
  float* const recurrent = raw + 2 * m.deter * kRows;  // behind the gates r and z
  float* const input = recurrent + m.deter * kRows;
  const auto spread = [](const float* from, int64_t count, float* to) {
    for (int64_t k = 0; k < count; ++k)
      for (int r = 0; r < kRows; ++r) to[k * kRows + r] = from[k];
  };
  spread(arrays.deter + agent * m.deter, m.deter, state);
  Put(state, m.deter, h);
  spread(arrays.stoch + agent * m.stoch, m.stoch, given);
  Put(given, m.stoch, s);
  Vec total[kVectors] = {}, weight[kVectors];
  for (Vec& w : weight) w = Fill(1.0f);
  for (int64_t t = 0; t < arrays.horizon; ++t) {
    Transpose(arrays.actions + (t * all + row) * m.action, rows, m.action, given);
    Put(given, m.action, action);
    Apply(m.input, s, raw);
    PutActivated(m.activation, raw, m.hidden, x);
    Apply(m.reset_update, x, raw);
    Apply(m.candidate_input, x, input);
    Apply(m.candidate_recurrent, h, recurrent);
    Gates(raw, input, recurrent, m.deter, state);
    Put(state, m.deter, h);

    Apply(m.prior_hidden, h, raw);
    PutActivated(m.activation, raw, m.hidden, inner);
    Apply(m.prior_out, inner, raw);
    if (arrays.noise != nullptr) {
      Transpose(arrays.noise + (t * all + row) * m.stoch, rows, m.stoch, given);
    } else {
      DrawNormals(arrays.seeds[agent], arrays.draw, begin, t, m.stoch, given);
    }
    Sample(raw, m.min_std, m.stoch, given);
    Put(given, m.stoch, s);

    ApplyHead(m, m.reward, h, inner, raw);
    for (int v = 0; v < kVectors; ++v) {
      total[v] += weight[v] * Load(raw + v * kLanes);
      weight[v] *= arrays.discount;
    }
    if (m.goes_on.count == 0) continue;
    ApplyHead(m, m.goes_on, h, inner, raw);
    for (int v = 0; v < kVectors; ++v) weight[v] *= Sigmoid(Load(raw + v * kLanes));
  }
  float returns[kRows];
  for (int v = 0; v < kVectors; ++v) Store(returns + v * kLanes, total[v]);
  std::memcpy(arrays.returns + row, returns, sizeof(float) * static_cast<size_t>(rows));
}

}  // namespace
}  // namespace orrery
