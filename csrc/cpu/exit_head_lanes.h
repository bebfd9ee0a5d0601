// The exit head for one vector width. No include guard: exit_head.cpp includes it once per instruction set, inside a
// namespace, with EEFAST_LANES floats per vector and EEFAST_TARGET as the attribute that admits the instructions.

#define EEFAST_INLINE EEFAST_TARGET static inline __attribute__((always_inline))

constexpr int64_t kLanes = EEFAST_LANES;
template <int64_t n>
struct FloatVector {
  typedef float type __attribute__((vector_size(4 * n)));
};
using Floats = FloatVector<kLanes>::type;
using Quad = FloatVector<4>::type;
typedef uint32_t Words __attribute__((vector_size(4 * EEFAST_LANES)));

// Samples of one pass over the weights; samples and weight rows that are multiplied at a time: enough chains of
// additions to hide their latency, and few loads for each.
constexpr int64_t kBlock = 32, kSamples = 4, kRows = 4;

EEFAST_INLINE int64_t pad(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

EEFAST_INLINE Floats load(const float* x) {
  Floats v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

// A loop, which compilers turn into one instruction; __builtin_convertvector becomes four in GCC 12.
EEFAST_INLINE Words load_words(const void* x) {
  uint16_t shorts[kLanes];
  uint32_t words[kLanes];
  std::memcpy(shorts, x, sizeof(shorts));
  for (int64_t i = 0; i < kLanes; ++i) words[i] = shorts[i];
  Words v;
  std::memcpy(&v, words, sizeof(v));
  return v;
}

EEFAST_INLINE Floats load(const BFloat16* x) { return (Floats)(load_words(x) << 16); }

EEFAST_INLINE Floats load(const Float16* x) {
  const Words bits = load_words(x);
  const Words magnitude = (bits & 0x7fff) << 13;
  // The product moves the exponent's bias from 15 to 127 and is exact, also for subnormal numbers.
  const Words scaled = (Words)((Floats)magnitude * 0x1p112f);
  const Words infinite = (Words)(magnitude >= (31u << 23)) & 0x7f800000u;
  return (Floats)(scaled | infinite | (bits & 0x8000) << 16);
}

EEFAST_INLINE Floats load(const double* x) {
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(x[i]);
  return load(lanes);
}

// The `n` elements at x, x + stride, …; zero in the lanes behind them.
template <class T>
EEFAST_INLINE Floats load_part(const T* x, int64_t n, int64_t stride = 1) {
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = x[i * stride];
  return load(lanes);
}

EEFAST_INLINE void store(float* x, Floats v) { std::memcpy(x, &v, sizeof(v)); }

// Adds the halves of a vector until four lanes are left.
template <int64_t n = kLanes>
EEFAST_INLINE Quad fold_lanes(typename FloatVector<n>::type v) {
  if constexpr (n == 4) {
    return v;
  } else {
    typename FloatVector<n / 2>::type halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return fold_lanes<n / 2>(halves[0] + halves[1]);
  }
}

EEFAST_INLINE float sum_lanes(Floats v) {
  const Quad q = fold_lanes(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// The sums of four vectors, side by side.
EEFAST_INLINE Quad sum_lanes(Floats a, Floats b, Floats c, Floats d) {
  const Quad p = fold_lanes(a), q = fold_lanes(b), r = fold_lanes(c), s = fold_lanes(d);
  const Quad pq = Quad{p[0], q[0], p[1], q[1]} + Quad{p[2], q[2], p[3], q[3]};
  const Quad rs = Quad{r[0], s[0], r[1], s[1]} + Quad{r[2], s[2], r[3], s[3]};
  return Quad{pq[0], pq[1], rs[0], rs[1]} + Quad{pq[2], pq[3], rs[2], rs[3]};
}

// Sum of `rows` rows, pairwise; of their first `n` columns where fewer than kLanes are left.
template <int64_t rows, class T>
EEFAST_INLINE Floats sum_rows(const T* x, int64_t stride, int64_t n) {
  if constexpr (rows == 1) {
    return n == kLanes ? load(x) : load_part(x, n);
  } else {
    return sum_rows<rows / 2>(x, stride, n) + sum_rows<rows / 2>(x + rows / 2 * stride, stride, n);
  }
}

template <int64_t rows, class T>
EEFAST_INLINE void add_rows(const T* x, int64_t width, int64_t stride, float* sums) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) store(sums + c, load(sums + c) + sum_rows<rows>(x + c, stride, kLanes));
  if (c < width) store(sums + c, load(sums + c) + sum_rows<rows>(x + c, stride, width - c));
}

// sums[c] += column c of a [rows, width] matrix. In a long column every tile has sums of its own, which keeps the
// rounding error small.
template <class T>
EEFAST_TARGET static void add_matrix(const T* x, int64_t rows, int64_t width, int64_t stride, float* sums,
                                     float* tile_sums) {
  constexpr int64_t kTile = 64;
  float* const own_sums = rows > kTile ? tile_sums : sums;
  while (rows > 0) {
    int64_t tile = std::min(rows, kTile);
    rows -= tile;
    for (; tile >= 8; tile -= 8, x += 8 * stride) add_rows<8>(x, width, stride, own_sums);
    for (; tile > 0; --tile, x += stride) add_rows<1>(x, width, stride, own_sums);
    if (own_sums == sums) return;
    for (int64_t c = 0; c < width; c += kLanes) {
      store(sums + c, load(sums + c) + load(tile_sums + c));
      store(tile_sums + c, Floats{});
    }
  }
}

// Channels-last: pixels side by side make one longer row, since few channels would leave lanes empty.
EEFAST_INLINE int64_t group_size(const ExitHead& head) {
  if (head.pixel_stride != head.channels) return 1;
  return std::clamp<int64_t>(64 / head.channels, 1, head.width);
}

// scratch: room for the sums of two groups.
template <class T>
EEFAST_TARGET static void pool_channels_last(const ExitHead& head, const T* x, float* pooled, float* scratch) {
  const int64_t channels = head.channels, group = group_size(head), width = group * channels;
  const int64_t groups = head.width / group, rest = head.width % group;
  float* const sums = scratch;
  float* const tile_sums = scratch + pad(width);
  for (int64_t c = 0; c < 2 * pad(width); c += kLanes) store(scratch + c, Floats{});
  for (int64_t y = 0; y < head.height; ++y, x += head.row_stride) {
    add_matrix(x, groups, width, group * head.pixel_stride, sums, tile_sums);
    add_matrix(x + groups * group * head.pixel_stride, rest, channels, head.pixel_stride, sums, tile_sums);
  }
  for (int64_t g = 1; g < group; ++g) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += sums[g * channels + c];
  }
  const float area = static_cast<float>(head.height * head.width);
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(pooled + c, load(sums + c) / area);
  for (; c < channels; ++c) pooled[c] = sums[c] / area;
}

template <class T>
EEFAST_INLINE Floats sum_line(const T* x, int64_t n, int64_t stride) {
  Floats sums[4] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      for (int64_t k = 0; k < 4; ++k) sums[k] += load(x + i + k * kLanes);
    }
    for (; i + kLanes <= n; i += kLanes) sums[0] += load(x + i);
  }
  for (; i < n; i += kLanes) sums[1] += load_part(x + i * stride, std::min(kLanes, n - i), stride);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T>
EEFAST_TARGET static void pool_planes(const ExitHead& head, const T* x, float* pooled) {
  const float area = static_cast<float>(head.height * head.width);
  for (int64_t c = 0; c < head.channels; ++c) {
    Floats sum = {};
    for (int64_t y = 0; y < head.height; ++y) {
      sum += sum_line(x + c * head.channel_stride + y * head.row_stride, head.width, head.pixel_stride);
    }
    pooled[c] = sum_lanes(sum) / area;
  }
}

// sums[r][s] += weights[r] · pooled[s] for the `n` channels from c on.
EEFAST_INLINE void add_products(const float* const (&weights)[kRows], const float* pooled, int64_t pooled_stride,
                                int64_t c, int64_t n, Floats (&sums)[kRows][kSamples]) {
  Floats x[kSamples];
  for (int64_t s = 0; s < kSamples; ++s) x[s] = load(pooled + s * pooled_stride + c);
  for (int64_t r = 0; r < kRows; ++r) {
    const Floats w = n == kLanes ? load(weights[r] + c) : load_part(weights[r] + c, n);
    for (int64_t s = 0; s < kSamples; ++s) sums[r][s] += w * x[s];
  }
}

// out[s][j] = weight[j] · pooled[s] + bias[j]. The rows of `pooled` are filled up with zeros to whole vectors, those of
// `out` have room for a multiple of kRows. An incomplete group of samples is computed whole, so that every sample meets
// the same instructions in every batch.
EEFAST_TARGET static void linear(const ExitHead& head, const float* pooled, int64_t pooled_stride, int64_t samples,
                                 float* out, int64_t out_stride) {
  const int64_t channels = head.channels, rows = head.num_classes + 1;
  // Weights of 16 KiB stay in the first-level cache while all samples pass by.
  const int64_t tile = std::max<int64_t>(1, 4096 / (kRows * channels)) * kRows;
  for (int64_t begin = 0; begin < rows; begin += tile) {
    for (int64_t s = 0; s < samples; s += kSamples) {
      for (int64_t j = begin; j < std::min(begin + tile, rows); j += kRows) {
        // Behind the last row it is repeated; nobody reads what comes of it.
        const float* weights[kRows];
        Quad bias;
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t row = std::min(j + r, rows - 1);
          weights[r] = head.weight + row * channels;
          bias[r] = head.bias[row];
        }
        const float* x = pooled + s * pooled_stride;
        Floats sums[kRows][kSamples] = {};
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) add_products(weights, x, pooled_stride, c, kLanes, sums);
        if (c < channels) add_products(weights, x, pooled_stride, c, channels - c, sums);
        for (int64_t k = 0; k < kSamples; ++k) {
          const Quad answer = sum_lanes(sums[0][k], sums[1][k], sums[2][k], sums[3][k]) + bias;
          std::memcpy(out + (s + k) * out_stride + j, &answer, sizeof(answer));
        }
      }
    }
  }
}

// e^x for x ≤ 0, NaN for NaN: 2^n · e^r with |r| ≤ log(2) / 2 and Cephes' polynomial for e^r. Below -87 it is 0, where
// the true value is next to the smallest normal number.
EEFAST_INLINE Floats exp_lanes(Floats x) {
  constexpr float kRound = 0x1.8p23f;
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Floats scale = (Floats)(((Words)shifted << 23) + 0x3f800000u);
  return (Floats)((Words)(p * scale) & ~(Words)(x < -87.0f));
}

// The criteria of eefast/criteria.py, rounded to float32 where PyTorch rounds. logits: the class logits and the
// confidence row, with room for whole vectors.
EEFAST_TARGET static float confidence(const ExitHead& head, float* logits) {
  if (head.criterion == Criterion::learned) return 1.0f / (1.0f + std::exp(-logits[head.num_classes]));
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  float first = kNone, second = kNone;
  for (int64_t k = 0; k < head.num_classes; ++k) {
    second = std::max(second, std::min(first, logits[k]));
    first = std::max(first, logits[k]);
  }
  std::fill(logits + head.num_classes, logits + pad(head.num_classes), kNone);
  Floats sums = {}, moments = {};
  for (int64_t k = 0; k < head.num_classes; k += kLanes) {
    const Floats x = load(logits + k) - first;
    const Floats e = exp_lanes(x);
    sums += e;
    // 0 · log 0 = 0, so where the probability is 0 its logarithm, maybe -inf, is taken for 0.
    moments += e * (Floats)((Words)x & ~(Words)(e == 0.0f));
  }
  const float sum = sum_lanes(sums);
  if (head.criterion == Criterion::max_probability) return 1.0f / sum;
  if (head.criterion == Criterion::margin) return 1.0f / sum - std::exp(second - first) / sum;
  return std::log(sum) - sum_lanes(moments) / sum;
}

EEFAST_TARGET static void finish(const ExitHead& head, int64_t i, float* logits) {
  const float value = confidence(head, logits);
  const bool leaves = head.threshold == nullptr ||
                      (head.criterion == Criterion::entropy ? value < *head.threshold : value > *head.threshold);
  head.survives[i] = !leaves;
  if (!leaves) return;
  const int64_t position = head.positions[i];
  float* row = head.logits + position * head.logits_row_stride;
  for (int64_t k = 0; k < head.num_classes; ++k) row[k * head.logits_column_stride] = logits[k];
  head.confidence[position * head.confidence_stride] = value;
  head.exits[position * head.exits_stride] = head.exit_index;
}

template <class T>
EEFAST_TARGET static void run_dtype(const ExitHead& head, int64_t begin, int64_t end) {
  const int64_t block = (std::min(kBlock, end - begin) + kSamples - 1) / kSamples * kSamples;
  const int64_t pooled_stride = whole_lines(head.channels), logits_stride = whole_lines(head.num_classes + 1);
  const int64_t sums_size = whole_lines(2 * pad(group_size(head) * head.channels));
  std::vector<CacheLine> buffer((block * (pooled_stride + logits_stride) + sums_size) / kLineFloats);
  float* const pooled = buffer.data()->values;
  float* const logits = pooled + block * pooled_stride;
  float* const scratch = logits + block * logits_stride;
  const T* features = static_cast<const T*>(head.features);
  // Backwards, since what the stage wrote last is still in the cache.
  for (int64_t i = begin + (end - begin - 1) / block * block; i >= begin; i -= block) {
    const int64_t samples = std::min(block, end - i);
    for (int64_t s = 0; s < samples; ++s) {
      const T* x = features + head.rows[i + s] * head.sample_stride;
      if (head.channel_stride == 1 && head.channels > 1) {
        pool_channels_last(head, x, pooled + s * pooled_stride, scratch);
      } else {
        pool_planes(head, x, pooled + s * pooled_stride);
      }
    }
    linear(head, pooled, pooled_stride, samples, logits, logits_stride);
    for (int64_t s = 0; s < samples; ++s) finish(head, i + s, logits + s * logits_stride);
  }
}

EEFAST_TARGET static void run(const ExitHead& head, int64_t begin, int64_t end) {
  switch (head.dtype) {
    case DType::float32: return run_dtype<float>(head, begin, end);
    case DType::float16: return run_dtype<Float16>(head, begin, end);
    case DType::bfloat16: return run_dtype<BFloat16>(head, begin, end);
    case DType::float64: return run_dtype<double>(head, begin, end);
  }
}

#undef EEFAST_INLINE
