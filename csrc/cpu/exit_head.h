// The CPU exit head: raw pointers → results and survivors.
#pragma once

#include <cstdint>

#include "types.h"

namespace eefast::cpu {

struct ExitHead : ExitHeadArguments {
  // One flag per entry of the live list: 1 where the sample survives, 0 where it exits.
  uint8_t* survives;
};

// Answers the entries [begin, end) of the live list. The answer of a sample depends on nothing but the sample: every
// split into ranges gives the same bits.
void exit_head(const ExitHead& head, int64_t begin, int64_t end);

// Partition of the live list: the survivors first in their order, then the others in reverse order. Returns
// the number of survivors.
int32_t partition(const int32_t* rows, const int32_t* positions, const uint8_t* survives, int64_t live, int64_t size,
                  int32_t* next_rows, int32_t* next_positions);

}  // namespace eefast::cpu
