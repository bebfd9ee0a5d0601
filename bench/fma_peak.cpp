// Prints how many multiply-adds of float32 one core does in a second, in billions: chains of them, nothing else.
#include <chrono>
#include <cstdio>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));

// Enough chains to hide the latency, few enough for 16 registers.
constexpr int kChains = 12;

int main() {
  double best = 0;
  float sum = 0;
  for (int round = 0; round < 5; ++round) {
    Floats chains[kChains] = {}, factor = {}, term = {};
    factor += 0.999f;
    term += 1e-3f;
    // Chains that begin alike would be computed once for all.
    for (int k = 0; k < kChains; ++k) chains[k] += static_cast<float>(k + round);
    constexpr long kSteps = 20000000;
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
      for (int k = 0; k < kChains; ++k) chains[k] = chains[k] * factor + term;
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    for (int k = 0; k < kChains; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) sum += chains[k][lane];
    }
    const double rate = kSteps * kChains * kLanes / seconds.count() / 1e9;
    if (rate > best) best = rate;
  }
  // Every lane is used, so that nothing is left out.
  std::printf("%.2f\n", sum > 0 ? best : 0.0);
}
