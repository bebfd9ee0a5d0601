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

// The rule's number for logits whose answer so far is in `logits` already: `carry` of eefast/criteria.py, without what
// is kept of the number so far. The same bits in every lane.
SIMT_DEVICE float weighed(const float* rule, const float* logits, int classes) {
  float sum = __ldg(rule + 5);
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    const auto criterion = static_cast<Criterion>(j);
    const float weight = __ldg(rule + j), sign = criterion == Criterion::entropy ? -weight : weight;
    if (weight != 0) sum += sign * confidence_of(criterion, logits, classes);
  }
  const float z = logits[classes], weight = __ldg(rule + 4);
  if (weight != 0) sum += weight * (fmaxf(z, 0.f) + log1pf(expf(-fabsf(z))));
  return sum;
}

// The first largest of the numbers that the lanes have, `stride` apart in memory; -1 where one is NaN.
SIMT_DEVICE int class_of(const float* logits, int classes, int64_t stride) {
  float best = -INFINITY;
  int found = classes;
  bool unclear = false;
  for (int k = lane_index(); k < classes; k += 32) {
    const float v = logits[k * stride];
    unclear = unclear || v != v;
    if (v > best || found == classes) best = v, found = k;
  }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    const float other = __shfl_xor_sync(~0u, best, bit);
    const int other_found = __shfl_xor_sync(~0u, found, bit);
    if (other > best || (other == best && other_found < found)) best = other, found = other_found;
  }
  return __ballot_sync(~0u, unclear) ? -1 : found;
}

// What is kept of the number so far: `now` and `then` are the classes of this exit and of the one before.
SIMT_DEVICE float kept(const float* rule, int now, int then, float value_so_far) {
  float factor = __ldg(rule + 6);
  if (__ldg(rule + 7) != 0) {
    if (now == then) factor += __ldg(rule + 7);
    if (now < 0 || then < 0) factor = NAN;
  }
  return factor == 0 && value_so_far == value_so_far ? 0.f : factor * value_so_far;
}

// To exit is defined by the comparison, to survive as its negation: a NaN goes on to the last exit.
SIMT_DEVICE bool leaves_by(Criterion criterion, float confidence, float threshold) {
  return criterion == Criterion::entropy ? confidence < threshold : confidence > threshold;
}

}  // namespace eefast::cuda
