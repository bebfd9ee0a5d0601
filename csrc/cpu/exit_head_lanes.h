// The exit head for one vector width. No include guard: compiled by for_each_isa.h.
//
// pooled[c] = mean over pixels of features[row, c];  logits = weight · pooled + bias;
// confidence = criterion(logits), or the rule's number;  exits where confidence > threshold, or < for entropy
#include "cpu/lanes.h"
#include "cpu/criterion_lanes.h"

// Samples of one pass over the weights; samples and weight rows that are multiplied at a time: enough chains of
// additions to hide their latency, and few loads for each.
constexpr int64_t kBlock = 32, kSamples = 4, kRows = 4;

// Rows of `width` columns are added up in vectors that start at columns 0, kLanes, … The last one moves back to end
// with the row; `settle` brings its sums to their columns.
EEFAST_INLINE int64_t column(int64_t vector, int64_t width) {
  return std::max<int64_t>(0, std::min(vector * kLanes, width - kLanes));
}
EEFAST_INLINE void settle(float* sums, int64_t width) {
  const int64_t last = (width - 1) / kLanes;
  store(sums + column(last, width), load(sums + last * kLanes));
}

// sums += n rows, pairwise.
template <int64_t n, class T>
EEFAST_INLINE Floats sum_rows(const T* x, int64_t stride) {
  if constexpr (n == 1) {
    return load(x);
  } else {
    return sum_rows<n / 2>(x, stride) + sum_rows<n / 2>(x + n / 2 * stride, stride);
  }
}
template <int64_t n, class T>
EEFAST_INLINE void add_rows(const T* x, int64_t width, int64_t stride, float* sums) {
  for (int64_t k = 0; k * kLanes < width; ++k) {
    store(sums + k * kLanes, load(sums + k * kLanes) + sum_rows<n>(x + column(k, width), stride));
  }
}

// sums += a [rows, width] matrix of at most n vectors per row. Memory is read in order; 32 rows at a time are added up
// in registers.
template <int64_t n, class T>
EEFAST_INLINE void add_narrow(const T* x, int64_t rows, int64_t width, int64_t stride, float* sums) {
  if constexpr (n > 1) {
    if (width <= (n - 1) * kLanes) return add_narrow<n - 1>(x, rows, width, stride, sums);
  }
  for (; rows > 0; rows -= 32) {
    Floats own_sums[n] = {};
    // Counted, since a stride may be 0.
    for (int64_t left = std::min<int64_t>(rows, 32); left > 0; --left, x += stride) {
      for (int64_t k = 0; k < n - 1; ++k) own_sums[k] += load(x + k * kLanes);
      own_sums[n - 1] += width < kLanes ? load_part(x, width) : load(x + width - kLanes);
    }
    for (int64_t k = 0; k < n; ++k) store(sums + k * kLanes, load(sums + k * kLanes) + own_sums[k]);
  }
}

// The same for wide rows, whose sums no longer fit into the registers: they are loaded and stored for four rows at a
// time. These are far apart, since processors foresee one stream of reads per page, not several.
template <class T>
EEFAST_INLINE void add_wide(const T* x, int64_t rows, int64_t width, int64_t stride, float* sums) {
  const int64_t quarter = rows / 4;
  for (int64_t i = 0; i < quarter; ++i) add_rows<4>(x + i * stride, width, quarter * stride, sums);
  for (int64_t i = 4 * quarter; i < rows; ++i) add_rows<1>(x + i * stride, width, stride, sums);
}

// The same for any width. In a long column every tile has separate sums, which keeps the rounding error small.
template <class T>
EEFAST_TARGET static void add_matrix(const T* x, int64_t rows, int64_t width, int64_t stride, float* sums,
                                     float* tile_sums) {
  constexpr int64_t kNarrow = 8;
  const bool narrow = width <= kNarrow * kLanes;
  const int64_t max_tile = narrow ? 1024 : 256;
  float* const own_sums = rows > max_tile ? tile_sums : sums;
  for (; rows > 0; rows -= max_tile, x += max_tile * stride) {
    const int64_t tile = std::min(rows, max_tile);
    if (narrow) {
      add_narrow<kNarrow>(x, tile, width, stride, own_sums);
    } else {
      add_wide(x, tile, width, stride, own_sums);
    }
    if (own_sums == sums) return;
    for (int64_t c = 0; c < width; c += kLanes) {
      store(sums + c, load(sums + c) + load(tile_sums + c));
      store(tile_sums + c, Floats{});
    }
  }
}

// Channels-last: adjacent pixels make one longer row, since few channels would leave lanes empty.
EEFAST_INLINE int64_t group_size(const ExitHead& head) {
  if (head.pixel_stride != head.channels) return 1;
  return std::clamp<int64_t>(64 / head.channels, 1, head.width);
}

// scratch: room for the sums of three groups.
template <class T>
EEFAST_TARGET static void pool_channels_last(const ExitHead& head, const T* x, float* pooled, float* scratch) {
  const int64_t channels = head.channels, group = group_size(head), width = group * channels;
  const int64_t groups = head.width / group, rest = head.width % group;
  float* const sums = scratch;
  float* const rest_sums = sums + pad(width);
  float* const tile_sums = rest_sums + pad(width);
  for (int64_t c = 0; c < 3 * pad(width); c += kLanes) store(scratch + c, Floats{});
  for (int64_t y = 0; y < head.height; ++y, x += head.row_stride) {
    add_matrix(x, groups, width, group * head.pixel_stride, sums, tile_sums);
    add_matrix(x + groups * group * head.pixel_stride, rest, channels, head.pixel_stride, rest_sums, tile_sums);
  }
  settle(sums, width);
  settle(rest_sums, channels);
  for (int64_t g = 1; g < group; ++g) {
    for (int64_t c = 0; c < channels; ++c) rest_sums[c] += sums[g * channels + c];
  }
  const float area = static_cast<float>(head.height * head.width);
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) store(pooled + c, (load(sums + c) + load(rest_sums + c)) / area);
  for (; c < channels; ++c) pooled[c] = (sums[c] + rest_sums[c]) / area;
}

// The last `n` elements in front of `end`, fewer than a vector, in the last lanes; zero in the others. `before`: how
// many elements may be read in front of `end`.
template <class T>
EEFAST_INLINE Floats load_last(const T* end, int64_t n, int64_t before) {
  if (before < kLanes) return load_part(end - n, n);
  Words lane;
  EEFAST_UNROLL
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = i;
  return (Floats)((Words)load(end - kLanes) & (Words)(lane >= static_cast<uint32_t>(kLanes - n)));
}

// sums[k] += line `y` of plane k, for the `planes` planes from `begin` on; a vector of sums for each.
template <class T>
EEFAST_TARGET static void add_lines(const ExitHead& head, const T* x, int64_t begin, int64_t planes, int64_t y,
                                    float* sums) {
  const int64_t n = head.width, whole = n / kLanes * kLanes, quads = n / (4 * kLanes) * (4 * kLanes);
  int64_t offset = begin * head.channel_stride + y * head.row_stride;
  if (head.pixel_stride != 1) {
    for (int64_t k = 0; k < planes; ++k, offset += head.channel_stride, sums += kLanes) {
      for (int64_t i = 0; i < n; i += kLanes) {
        const T* const pixels = x + offset + i * head.pixel_stride;
        store(sums, load(sums) + load_part(pixels, std::min(kLanes, n - i), head.pixel_stride));
      }
    }
    return;
  }
  for (int64_t k = 0; k < planes; ++k, offset += head.channel_stride, sums += kLanes) {
    const T* const line = x + offset;
    Floats parts[4] = {load(sums)};
    int64_t i = 0;
    for (; i < quads; i += 4 * kLanes) {
      EEFAST_UNROLL
      for (int64_t p = 0; p < 4; ++p) parts[p] += load(line + i + p * kLanes);
    }
    for (; i < whole; i += kLanes) parts[1] += load(line + i);
    if (i < n) parts[2] += load_last(line + n, n - i, offset + n);
    store(sums, (parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
}

template <class T>
EEFAST_TARGET static void pool_planes(const ExitHead& head, const T* x, float* pooled) {
  const float area = static_cast<float>(head.height * head.width);
  for (int64_t begin = 0; begin < head.channels; begin += kLanes) {
    Floats sums[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) sums[k] = Floats{};
    for (int64_t y = 0; y < head.height; ++y) {
      add_lines(head, x, begin, std::min(kLanes, head.channels - begin), y, reinterpret_cast<float*>(sums));
    }
    store(pooled + begin, sum_lanes(sums) / area);
  }
}

// Rows of weights that stay in the first-level cache while all samples pass by: 16 KiB.
EEFAST_INLINE int64_t tile_rows(int64_t stride) { return std::max<int64_t>(1, 4096 / (kRows * stride)) * kRows; }

// out[s][j] = weight[j] · pooled[s] + bias[j]. The rows of `pooled` are filled up with zeros to `stride`, those of
// `out` have room for a multiple of kRows. An incomplete group of samples is computed whole, so that every sample meets
// the same instructions in every batch. packed: zeros, room for as many rows of `stride` as a tile has.
EEFAST_TARGET static void linear(const ExitHead& head, const float* pooled, int64_t stride, int64_t samples, float* out,
                                 int64_t out_stride, float* packed) {
  const int64_t channels = head.channels, rows = head.num_classes + 1, tile = tile_rows(stride);
  const bool whole = channels % kLanes == 0;
  const int64_t weight_stride = whole ? channels : stride;
  for (int64_t begin = 0; begin < rows; begin += tile) {
    const int64_t end = std::min(begin + tile, rows);
    if (!whole) {
      for (int64_t j = begin; j < end; ++j) {
        std::memcpy(packed + (j - begin) * stride, head.weight + j * channels, channels * sizeof(float));
      }
    }
    const float* const weight = whole ? head.weight + begin * channels : packed;
    for (int64_t s = 0; s < samples; s += kSamples) {
      for (int64_t j = begin; j < end; j += kRows) {
        // Beyond the last row it is repeated; the result is not read.
        const float* w[kRows];
        Quad bias;
        EEFAST_UNROLL
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t row = std::min(j + r, rows - 1);
          w[r] = weight + (row - begin) * weight_stride;
          bias[r] = head.bias[row];
        }
        const float* const x = pooled + s * stride;
        Floats sums[kSamples * kRows] = {};
        for (int64_t c = 0; c < channels; c += kLanes) {
          Floats lanes[kSamples];
          EEFAST_UNROLL
          for (int64_t k = 0; k < kSamples; ++k) lanes[k] = load(x + k * stride + c);
          EEFAST_UNROLL
          for (int64_t k = 0; k < kSamples * kRows; ++k) {
            sums[k % kSamples * kRows + k / kSamples] += lanes[k % kSamples] * load(w[k / kSamples] + c);
          }
        }
        float answers[kSamples * kRows];
        for (int64_t k = 0; k < kSamples * kRows; k += kLanes) store(answers + k, sum_lanes(sums + k));
        for (int64_t k = 0; k < kSamples; ++k) {
          Quad answer;
          std::memcpy(&answer, answers + k * kRows, sizeof(answer));
          answer += bias;
          std::memcpy(out + (s + k) * out_stride + j, &answer, sizeof(answer));
        }
      }
    }
  }
}

// carries: whether there is a rule, by which the rows of survivors are written, too.
template <bool carries>
EEFAST_TARGET static void finish(const ExitHead& head, int64_t i, float* logits) {
  const int64_t position = head.positions[i];
  float* const row = head.logits + position * head.logits_row_stride;
  float* const answered = head.confidence + position * head.confidence_stride;
  float value;
  if constexpr (carries) {
    value = carry(head.rule, head.num_classes, logits, row, head.logits_column_stride, answered);
  } else {
    value = confidence(head.criterion, head.num_classes, logits);
  }
  const float* threshold = head.threshold;
  if (threshold != nullptr && head.threshold_of_each) {
    threshold += position * head.threshold_stride;
    if (*threshold != *threshold) threshold = nullptr;
  }
  const bool leaves = threshold == nullptr || leaves_at(head.criterion, value, *threshold);
  head.survives[i] = !leaves;
  if (!carries && !leaves) return;
  for (int64_t k = 0; k < head.num_classes; ++k) row[k * head.logits_column_stride] = logits[k];
  *answered = value;
  if (!leaves) return;
  head.exits[position * head.exits_stride] = head.exit_index;
}

template <class T>
EEFAST_TARGET static void run_dtype(const ExitHead& head, int64_t begin, int64_t end) {
  const int64_t block = (std::min(kBlock, end - begin) + kSamples - 1) / kSamples * kSamples;
  const int64_t pooled_stride = whole_lines(head.channels), logits_stride = whole_lines(head.num_classes + 1);
  const int64_t sums_size = whole_lines(3 * pad(group_size(head) * head.channels));
  const int64_t packed_size = head.channels % kLanes == 0 ? 0 : tile_rows(pooled_stride) * pooled_stride;
  auto buffer = room<CacheLine>("an exit's sums",
                                (block * (pooled_stride + logits_stride) + sums_size + packed_size) / kLineFloats);
  float* const pooled = buffer.data()->values;
  float* const logits = pooled + block * pooled_stride;
  float* const scratch = logits + block * logits_stride;
  float* const packed = scratch + sums_size;
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
    linear(head, pooled, pooled_stride, samples, logits, logits_stride, packed);
    const auto finish_one = head.rule == nullptr ? finish<false> : finish<true>;
    for (int64_t s = 0; s < samples; ++s) finish_one(head, i + s, logits + s * logits_stride);
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
