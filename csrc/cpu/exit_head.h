// The CPU exit head behind raw pointers: what it reads, what it writes, how it is called.
#pragma once

#include <cstdint>

namespace eefast::cpu {

enum class DType { float32, float16, bfloat16, float64 };
enum class Criterion { learned, max_probability, entropy, margin };

struct ExitHead {
  // [M, channels, height, width]; strides in elements, any values.
  const void* features;
  DType dtype;
  int64_t channels, height, width;
  int64_t sample_stride, channel_stride, row_stride, pixel_stride;

  // [num_classes + 1, channels] and [num_classes + 1], contiguous: the class rows, then the confidence row.
  const float* weight;
  const float* bias;
  int64_t num_classes;

  Criterion criterion;
  // Null at the final exit, where everybody leaves.
  const float* threshold;
  int64_t exit_index;

  // The live list: row of `features` and place in the results of each sample.
  const int32_t* rows;
  const int32_t* positions;

  // [N, num_classes], [N] and [N]; written at the positions of leaving samples only.
  float* logits;
  int64_t logits_row_stride, logits_column_stride;
  float* confidence;
  int64_t confidence_stride;
  int64_t* exits;
  int64_t exits_stride;

  // One flag per entry of the live list: 1 where the sample survives, 0 where it leaves.
  uint8_t* survives;
};

// Answers the entries [begin, end) of the live list. The answer of a sample depends on nothing but the sample: every
// split into ranges gives the same bits.
void exit_head(const ExitHead& head, int64_t begin, int64_t end);

// Partition of the live list: the survivors first in their order, the others behind in reverse order. Returns the
// number of survivors.
int32_t partition(const int32_t* rows, const int32_t* positions, const uint8_t* survives, int64_t live, int64_t size,
                  int32_t* next_rows, int32_t* next_positions);

}  // namespace eefast::cpu
