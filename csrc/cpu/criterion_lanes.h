// The exit rules of eefast/criteria.py for one vector width. No include guard: included after lanes.h.

// e^x for x ≤ 0, NaN for NaN. Below -87 it is 0, where the true value is next to the smallest normal number.
EEFAST_INLINE Floats exp_lanes(Floats x) { return (Floats)((Words)exp_between(x) & ~(Words)(x < -87.0f)); }

// What the criteria need of a softmax: the two largest logits, the sums of e^(x - first) and of (x - first) e^(x -
// first).
struct Softmax {
  float first, second, sum;
  Floats moments;
};

// logits: the class logits and the confidence row, with room for whole vectors; the row is lost.
EEFAST_INLINE Softmax softmax(int64_t num_classes, float* logits) {
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
  return {first, second, sum_lanes(sums), moments};
}

// The criteria of eefast/criteria.py, rounded to float32 where PyTorch rounds.
EEFAST_INLINE float learned(float confidence_logit) { return 1.0f / (1.0f + std::exp(-confidence_logit)); }
EEFAST_INLINE float max_probability(const Softmax& p) { return 1.0f / p.sum; }
EEFAST_INLINE float margin(const Softmax& p) { return 1.0f / p.sum - std::exp(p.second - p.first) / p.sum; }
EEFAST_INLINE float entropy(const Softmax& p) { return std::log(p.sum) - sum_lanes(p.moments) / p.sum; }

// logits: as of `softmax`.
EEFAST_TARGET static float confidence(Criterion criterion, int64_t num_classes, float* logits) {
  if (criterion == Criterion::learned) return learned(logits[num_classes]);
  const Softmax p = softmax(num_classes, logits);
  if (criterion == Criterion::max_probability) return max_probability(p);
  return criterion == Criterion::margin ? margin(p) : entropy(p);
}

EEFAST_INLINE bool leaves_at(Criterion criterion, float value, float threshold) {
  return criterion == Criterion::entropy ? value < threshold : value > threshold;
}

// The first of the largest numbers, -1 where one is NaN. Whole vectors first, where numbers are adjacent: every lane
// keeps its largest number and the place of that.
EEFAST_INLINE int64_t class_of(const float* logits, int64_t num_classes, int64_t stride) {
  const int64_t whole = stride == 1 ? num_classes / kLanes * kLanes : 0;
  int64_t found = 0;
  bool unclear = false;
  if (whole > 0) {
    Floats most = load(logits);
    Words place, broken = {};
    EEFAST_UNROLL
    for (int64_t i = 0; i < kLanes; ++i) place[i] = i;
    Words best = place;
    for (int64_t k = 0; k < whole; k += kLanes, place += static_cast<uint32_t>(kLanes)) {
      const Floats x = load(logits + k);
      const Words more = (Words)(x > most);
      broken |= (Words)(x != x);
      most = (Floats)(((Words)x & more) | ((Words)most & ~more));
      best = (place & more) | (best & ~more);
    }
    found = best[0];
    for (int64_t i = 0; i < kLanes; ++i) {
      unclear |= broken[i] != 0;
      const int64_t other = best[i];
      if (logits[other] > logits[found] || (logits[other] == logits[found] && other < found)) found = other;
    }
  }
  for (int64_t k = whole; k < num_classes; ++k) {
    const float x = logits[k * stride];
    unclear |= x != x;
    if (x > logits[found * stride]) found = k;
  }
  return unclear ? -1 : found;
}

// `carry` of eefast/criteria.py: the logits, as of `confidence`, become the answer so far; returns the number that is
// compared. before, value_before: what this said at the exit before, logits `stride` apart; read only where needed.
EEFAST_TARGET static float carry(const float* rule, int64_t num_classes, float* logits, const float* before,
                                 int64_t stride, const float* value_before) {
  const float keep = rule[6], keep_if_same = rule[7], a = rule[8], z = logits[num_classes];
  if (a != 0.0f) {
    for (int64_t k = 0; k < num_classes; ++k) logits[k] += a * before[k * stride];
  }
  float sum = rule[5];
  // Both numbers of the confidence row take it where that is positive.
  const float e = rule[4] != 0.0f ? std::exp(-std::abs(z)) : 0.0f;
  if (rule[0] != 0.0f) sum += rule[0] * (rule[4] != 0.0f && z >= 0.0f ? 1.0f / (1.0f + e) : learned(z));
  if (rule[1] != 0.0f || rule[2] != 0.0f || rule[3] != 0.0f) {
    const Softmax p = softmax(num_classes, logits);
    if (rule[1] != 0.0f) sum += rule[1] * max_probability(p);
    if (rule[2] != 0.0f) sum += rule[2] * -entropy(p);
    if (rule[3] != 0.0f) sum += rule[3] * margin(p);
  }
  if (rule[4] != 0.0f) sum += rule[4] * (std::max(z, 0.0f) + std::log1p(e));
  if (keep == 0.0f && keep_if_same == 0.0f) return sum;
  float factor = keep;
  if (keep_if_same != 0.0f) {
    const int64_t now = class_of(logits, num_classes, 1), then = class_of(before, num_classes, stride);
    if (now == then) factor += keep_if_same;
    if (now < 0 || then < 0) factor = std::numeric_limits<float>::quiet_NaN();
  }
  return factor == 0.0f && *value_before == *value_before ? sum : sum + factor * *value_before;
}
