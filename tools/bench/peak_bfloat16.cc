// What a processor with AVX512-BF16 can do at most: dot products of bfloat16 on independent registers, on one thread a core.
//
//   g++ -O3 -mavx512f -mavx512bf16 -pthread tools/bench/peak_bfloat16.cc -o build/peak_bfloat16 && build/peak_bfloat16
#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

constexpr long kRepeats = 40'000'000;
constexpr int kSums = 12;  // more than enough to hide the latency

double FlopsPerSecond() {
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  __m512bh a = (__m512bh)_mm512_set1_epi32(1);
  const auto start = std::chrono::steady_clock::now();
  for (long i = 0; i < kRepeats; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) sums[k] = _mm512_dpbf16_ps(sums[k], a, a);
    asm volatile("" : "+v"(a));
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  for (const __m512& sum : sums) asm volatile("" : : "v"(sum));  // somebody wants them
  return kRepeats * double{kSums} * 64 / seconds.count();  // 16 lanes, 2 products and 2 sums each
}

}  // namespace

int main() {
  std::vector<double> flops(std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (double& each : flops) threads.emplace_back([&each] { each = FlopsPerSecond(); });
  double total = 0;
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i].join();
    total += flops[i];
  }
  std::printf("%.0f GFLOP/s on %zu threads\n", total / 1e9, threads.size());
}
