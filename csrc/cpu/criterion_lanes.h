// The exit rules of eefast/criteria.py for one vector width. No include guard: included after lanes.h.

// e^x for x ≤ 0, NaN for NaN. Below -87 it is 0, where the true value is next to the smallest normal number.
EEFAST_INLINE Floats exp_lanes(Floats x) { return (Floats)((Words)exp_between(x) & ~(Words)(x < -87.0f)); }

// The criteria of eefast/criteria.py, rounded to float32 where PyTorch rounds. logits: the class logits and the
// confidence row, with room for whole vectors.
EEFAST_TARGET static float confidence(Criterion criterion, int64_t num_classes, float* logits) {
  if (criterion == Criterion::learned) return 1.0f / (1.0f + std::exp(-logits[num_classes]));
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  float first = kNone, second = kNone;
  for (int64_t k = 0; k < num_classes; ++k) {
    second = std::max(second, std::min(first, logits[k]));
    first = std::max(first, logits[k]);
  }
  std::fill(logits + num_classes, logits + pad(num_classes), kNone);
  Floats sums = {}, moments = {};
  for (int64_t k = 0; k < num_classes; k += kLanes) {
    const Floats x = load(logits + k) - first;
    const Floats e = exp_lanes(x);
    sums += e;
    // 0 · log 0 = 0, so where the probability is 0 its logarithm, maybe -inf, is taken for 0.
    moments += e * (Floats)((Words)x & ~(Words)(e == 0.0f));
  }
  const float sum = sum_lanes(sums);
  if (criterion == Criterion::max_probability) return 1.0f / sum;
  if (criterion == Criterion::margin) return 1.0f / sum - std::exp(second - first) / sum;
  return std::log(sum) - sum_lanes(moments) / sum;
}

EEFAST_INLINE bool leaves_at(Criterion criterion, float value, float threshold) {
  return criterion == Criterion::entropy ? value < threshold : value > threshold;
}
