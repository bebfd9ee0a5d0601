// Logits → confidence → whether the sample exits, as in eefast/criteria.py; computed by one warp.
#pragma once

#include "cuda/simt.h"
#include "types.h"

namespace eefast::cuda {

SIMT_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / 32; }
SIMT_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }

SIMT_DEVICE float sum_of_warp(float v) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) v += __shfl_xor_sync(~0u, v, bit);
  return v;
}

// The same bits in every lane.
SIMT_DEVICE float confidence_of(Criterion criterion, const float* logits, int classes) {
  if (criterion == Criterion::learned) return 1.f / (1.f + expf(-logits[classes]));
  float first = -INFINITY, second = -INFINITY;
  for (int k = lane_index(); k < classes; k += 32) {
    const float v = logits[k];
    second = fmaxf(second, fminf(v, first));
    first = fmaxf(first, v);
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    const float other = __shfl_xor_sync(~0u, first, bit), other_second = __shfl_xor_sync(~0u, second, bit);
    second = fmaxf(fmaxf(second, other_second), fminf(first, other));
    first = fmaxf(first, other);
  }
  // A NaN logit is dropped by the maxima, but not by the sum.
  float sum = 0, moment = 0;
  for (int k = lane_index(); k < classes; k += 32) {
    const float shifted = logits[k] - first, power = expf(shifted);
    sum += power;
    // 0 · log 0 = 0; a NaN is not 0 and stays NaN.
    if (power != 0) moment += power * shifted;
  }
  sum = sum_of_warp(sum);
  if (criterion == Criterion::max_probability) return 1.f / sum;
  if (criterion == Criterion::margin) return classes > 1 ? 1.f / sum - expf(second - first) / sum : 1.f / sum;
  return logf(sum) - sum_of_warp(moment) / sum;
}

// To exit is defined by the comparison, to survive as its negation: a NaN goes on to the last exit.
SIMT_DEVICE bool leaves_by(Criterion criterion, float confidence, float threshold) {
  return criterion == Criterion::entropy ? confidence < threshold : confidence > threshold;
}

}  // namespace eefast::cuda
