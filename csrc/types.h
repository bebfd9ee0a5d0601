// Types that the CPU and the CUDA kernels share.
#pragma once

#include <cstdint>

namespace eefast {

enum class DType { float32, float16, bfloat16, float64 };
enum class Criterion { learned, max_probability, entropy, margin, carried };

// Numbers of an exit in a rule that carries the answer so far: five weights, bias, keep, keep_if_same, a; see `carry`
// in eefast/criteria.py.
constexpr int64_t kRuleNumbers = 9;

// What eefast::exit_head reads and writes.
struct ExitHeadArguments {
  static constexpr int kMaxClassesOnCuda = 8191;  // what shared memory holds; as in eefast/ops/exit_head.py

  // [samples, channels, height, width]; strides in elements, any values.
  const void* features;
  DType dtype;
  int64_t samples, channels, height, width;
  int64_t sample_stride, channel_stride, row_stride, pixel_stride;

  // [num_classes + 1, channels] and [num_classes + 1], contiguous: the class rows, then the confidence row.
  const float* weight;
  const float* bias;
  int64_t num_classes;

  Criterion criterion;
  // Null at the final exit, where every sample exits; else see `threshold_of_each`.
  const float* threshold;
  int64_t exit_index;

  // The live list: row of `features` and place in the results of each sample; the first `live` of `size` entries count.
  const int32_t* rows;
  const int32_t* positions;
  const int32_t* live;
  int64_t size;

  // [results, num_classes], [results] and [results]; written only at the positions of samples that exit, but see
  // `rule`.
  float* logits;
  int64_t logits_row_stride, logits_column_stride;
  float* confidence;
  int64_t confidence_stride;
  int64_t* exits;
  int64_t exits_stride;
  int64_t results;

  // Whether every place in the results has its threshold, among which NaN lets the sample exit, whatever its
  // confidence.
  bool threshold_of_each;
  int64_t threshold_stride;

  // With Criterion::carried kRuleNumbers numbers, else null. Then rows of logits and confidence are read, unless the
  // numbers that they are multiplied by are 0, and written for all live samples.
  const float* rule;
};

// What eefast::gather_survivors reads and writes: out[offset + i] = features[rows[i]] for i < live.
struct GatherArguments {
  // Every row is dense, of `row_bytes`; strides in bytes.
  const void* features;
  int64_t samples, sample_stride;
  int64_t row_bytes;
  const int32_t* rows;
  const int32_t* live;
  int64_t size;  // of rows
  void* out;
  int64_t out_stride;
  const int32_t* offset;  // may be null: 0
  int64_t places;         // rows of out
};

}  // namespace eefast
