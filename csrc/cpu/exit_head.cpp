// The CPU exit head, compiled once per instruction set; partitions the live list.
#include "cpu/exit_head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/room.h"

namespace eefast::cpu {
namespace {

// Buffers are made of whole cache lines, since vectors that straddle two lines load at half the speed.
constexpr int64_t kLineFloats = 16;
struct alignas(64) CacheLine {
  float values[kLineFloats];
};
int64_t whole_lines(int64_t floats) { return (floats + kLineFloats - 1) / kLineFloats * kLineFloats; }

#define EEFAST_LANES_FILE "cpu/exit_head_lanes.h"
#include "cpu/for_each_isa.h"

using Kernel = void (*)(const ExitHead&, int64_t, int64_t);

Kernel select_kernel() {
#ifdef EEFAST_X86
  const InstructionSet best = instruction_set();
  if (best > InstructionSet::avx2) return avx512::run;
#ifndef EEFAST_SANITIZED
  if (best == InstructionSet::avx2) return avx2::run;
#endif
#endif
  return portable::run;
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
