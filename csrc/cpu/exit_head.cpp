// Chooses the instruction set for the CPU exit head at run time; partitions the live list.
#include "cpu/exit_head.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define EEFAST_X86
#endif

// Vectors only travel between inlined functions, so that their calling convention never matters.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace eefast::cpu {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Buffers are made of whole cache lines, since vectors that straddle two lines load at half the speed.
constexpr int64_t kLineFloats = 16;
struct alignas(64) CacheLine {
  float values[kLineFloats];
};
int64_t whole_lines(int64_t floats) { return (floats + kLineFloats - 1) / kLineFloats * kLineFloats; }

namespace baseline {
#define EEFAST_LANES 4
#define EEFAST_TARGET
#include "cpu/exit_head_lanes.h"
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace baseline

#ifdef EEFAST_X86
namespace avx2 {
#define EEFAST_LANES 8
#define EEFAST_TARGET __attribute__((target("avx2,fma,f16c")))
#include "cpu/exit_head_lanes.h"
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace avx2

namespace avx512 {
#define EEFAST_LANES 16
#define EEFAST_TARGET __attribute__((target("avx512f,fma")))
#include "cpu/exit_head_lanes.h"
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace avx512
#endif

using Kernel = void (*)(const ExitHead&, int64_t, int64_t);

Kernel select_kernel() {
#ifdef EEFAST_X86
  // The variable with which PyTorch lets its own kernels be held back.
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view capability = limit == nullptr ? "" : limit;
  if (capability != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return capability != "avx2" && __builtin_cpu_supports("avx512f") ? avx512::run : avx2::run;
  }
#endif
  return baseline::run;
}

}  // namespace

void exit_head(const ExitHead& head, int64_t begin, int64_t end) {
  static const Kernel kernel = select_kernel();
  kernel(head, begin, end);
}

int32_t partition(const int32_t* rows, const int32_t* positions, const uint8_t* survives, int64_t live, int64_t size,
                  int32_t* next_rows, int32_t* next_positions) {
  const auto survivors = static_cast<int32_t>(std::count(survives, survives + live, uint8_t{1}));
  int64_t before = 0;
  for (int64_t i = 0; i < size; ++i) {
    const bool survivor = i < live && survives[i];
    const int64_t place = survivor ? before : size - 1 - (i - before);
    before += survivor;
    next_rows[place] = rows[i];
    next_positions[place] = positions[i];
  }
  return survivors;
}

}  // namespace eefast::cpu
