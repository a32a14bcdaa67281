#include <benchmark/benchmark.h>

#include <random>

#include "libs/replay/chunk_codec.h"

namespace orrery {
namespace {

// 50 pictures of 64x64: a gradient with a moving block and noise in the lowest bit.
ArrayMap Rows() {
  Array image = Array::Zeros(DType::kUInt8, {50, 64, 64, 3});
  auto x = image.mutable_as<uint8_t>();
  std::mt19937_64 random(1);
  for (int t = 0; t < 50; ++t) {
    for (int i = 0; i < 64 * 64 * 3; ++i) {
      const int row = i / 192, column = i / 3 % 64;
      const bool block = row > 20 && row < 40 && column >= t && column < t + 10;
      x[t * 64 * 64 * 3 + i] = static_cast<uint8_t>((block ? 180 : row + column) + (random() % 16 == 0));
    }
  }
  return {{"image", image}, {kReward, Array::Zeros(DType::kFloat32, {50})}};
}

void BM_EncodeRows(benchmark::State& state) {
  const ArrayMap rows = Rows();
  for (auto _ : state) benchmark::DoNotOptimize(EncodeRows(rows));
  state.SetBytesProcessed(state.iterations() * rows.at("image").bytes.size());
  state.counters["ratio"] = static_cast<double>(rows.at("image").bytes.size()) / EncodeRows(rows)->size();
}
BENCHMARK(BM_EncodeRows);

void BM_DecodeRows(benchmark::State& state) {
  const ArrayMap rows = Rows();
  const std::string payload = *EncodeRows(rows);
  for (auto _ : state) benchmark::DoNotOptimize(DecodeRows(payload, 50));
  state.SetBytesProcessed(state.iterations() * rows.at("image").bytes.size());
}
BENCHMARK(BM_DecodeRows);

}  // namespace
}  // namespace orrery
