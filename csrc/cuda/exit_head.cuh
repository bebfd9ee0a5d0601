// The exit head: global average pool → logits → criterion → results and survivor list.
//
//   pooled[c] = mean over pixels of features[row, c];  logits = weight · pooled + bias
//   confidence = criterion(logits);  exits = confidence > threshold, or < for entropy
//
// Bytes moved: the live samples' maps once, the weights from the cache, 26 bytes per entry of the live list, most of
// them through the L2 cache, and the results of leaving samples; with a rule those of all live samples, in and out.
//
// A block has 8 warps and takes up to 8 samples at a time: warps pool (one or several per sample), then take class
// rows, each for all samples of the tile, then one sample each for the criterion. Sums are float32 and of a fixed
// order. The block that is done last writes the next live list: survivors to the front, all others to the back in
// reverse order, so that one pass over the flags places everything. No block waits for another.
//
// With many classes that would be few blocks with much work each, so there are three launches: `pool`, with several
// blocks for a large map, `classify`, with one for each tile and some class rows, `decide` for the rest.
#pragma once

#include "cuda/criterion.cuh"
#include "cuda/exit_head.h"
#include "cuda/simt.h"

namespace eefast::cuda {
namespace exit_head_kernel {

using Tiles = ExitHeadTiles;
constexpr int kUnroll = 4;  // loads in flight per thread

SIMT_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

SIMT_DEVICE float float_of(float v) { return v; }
SIMT_DEVICE float float_of(__half v) { return __half2float(v); }
SIMT_DEVICE float float_of(__nv_bfloat16 v) { return __bfloat162float(v); }

// Eight sums over the lanes at once, by nine shuffles: lane l gets the sum of v[l % 8]. The same tree for each.
SIMT_DEVICE float sums_of_warp(float (&v)[8]) {
  const int lane = lane_index();
#pragma unroll
  for (int bit = 1; bit < 8; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4 / bit; ++i) {
      const bool odd = lane & bit;
      const float keep = odd ? v[2 * i + 1] : v[2 * i], give = odd ? v[2 * i] : v[2 * i + 1];
      v[i] = keep + __shfl_xor_sync(~0u, give, bit);
    }
  }
  float sum = v[0];
#pragma unroll
  for (int bit = 8; bit < 32; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
  return sum;
}

// Neighbouring elements as they come from memory.
template <class T, int VECTOR>
struct Vector {
  uint4 bits;
  SIMT_DEVICE void load(const T* place) { bits = __ldg(reinterpret_cast<const uint4*>(place)); }
  SIMT_DEVICE void gather(const T* place, int64_t stride) {
    T* const element = reinterpret_cast<T*>(&bits);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) element[i] = __ldg(place + i * stride);
  }
  SIMT_DEVICE float at(int i) const { return float_of(reinterpret_cast<const T*>(&bits)[i]); }
};
template <class T>
struct Vector<T, 1> {
  T element;
  SIMT_DEVICE void load(const T* place) { element = __ldg(place); }
  SIMT_DEVICE void gather(const T* place, int64_t) { load(place); }
  SIMT_DEVICE float at(int) const { return float_of(element); }
};

// kUnroll vectors, all under way before the first one is used; zero where `valid` says no.
template <class T, int VECTOR, class Place, class Valid>
SIMT_DEVICE void load(Vector<T, VECTOR> (&vector)[kUnroll], bool aligned, int64_t stride, Place place, Valid valid) {
  if (aligned) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      vector[u] = {};
      if (valid(u)) vector[u].load(place(u));
    }
  } else {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      vector[u] = {};
      if (valid(u)) vector[u].gather(place(u), stride);
    }
  }
}

template <class T, int VECTOR>
SIMT_DEVICE float total(const Vector<T, VECTOR>& v) {
  float sum[VECTOR];
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) sum[i] = v.at(i);
#pragma unroll
  for (int half = VECTOR / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

// sums[c] = sum over the pixels of channel c; a plane belongs to some lanes of one warp. part: which of the warps that
// share the sample.
template <class T, int VECTOR>
SIMT_DEVICE void pool_planes(const Tiles& tiles, const T* map, int channels, int part, float* sums) {
  const int groups = tiles.columns / VECTOR, planes = 32 / tiles.lanes;
  const int step = tiles.warps_per_sample * planes, lane = lane_index() & (tiles.lanes - 1);
  for (int first = part * planes; first < channels; first += kUnroll * step) {
    const int channel = first + lane_index() / tiles.lanes;
    float sum[kUnroll] = {};
    for (int line = 0; line < tiles.lines; ++line) {
      for (int i = lane; i < groups; i += tiles.lanes) {
        const T* const place = map + line * tiles.line_stride + i * VECTOR * tiles.pixel_stride;
        Vector<T, VECTOR> vector[kUnroll];
        load(
            vector, tiles.aligned, tiles.pixel_stride,
            [&](int u) { return place + (channel + u * step) * tiles.channel_stride; },
            [&](int u) { return channel + u * step < channels; });
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) sum[u] += total(vector[u]);
      }
    }
    for (int bit = 1; bit < tiles.lanes; bit *= 2) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) sum[u] += __shfl_xor_sync(~0u, sum[u], bit);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (lane == 0 && channel + u * step < channels) sums[channel + u * step] = sum[u];
    }
  }
}

// The same where channels are adjacent; each warp gives the sums over its part of the pixels.
template <class T, int VECTOR>
SIMT_DEVICE void pool_channels_last(const Tiles& tiles, const T* map, int channels, int part, float* sums) {
  const int groups = channels / VECTOR, columns = 32 / tiles.lanes;
  const int step = tiles.warps_per_sample * columns, lane = lane_index() & (tiles.lanes - 1);
  const int first_pixel = part * columns + lane_index() / tiles.lanes;
  for (int first = 0; first < groups; first += tiles.lanes) {
    const bool mine = first + lane < groups;
    float sum[VECTOR] = {};
    for (int line = 0; mine && line < tiles.lines; ++line) {
      const T* const place = map + (first + lane) * VECTOR + line * tiles.line_stride;
      for (int pixel = first_pixel; pixel < tiles.columns; pixel += kUnroll * step) {
        Vector<T, VECTOR> vector[kUnroll];
        load(
            vector, tiles.aligned, 1, [&](int u) { return place + (pixel + u * step) * tiles.pixel_stride; },
            [&](int u) { return pixel + u * step < tiles.columns; });
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) sum[i] += vector[u].at(i);
        }
      }
    }
    for (int bit = tiles.lanes; bit < 32; bit *= 2) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], bit);
    }
    if (mine && lane_index() < tiles.lanes) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sums[(first + lane) * VECTOR + i] = sum[i];
    }
  }
}

// logits += weight · means, for the channels of a chunk, all samples of a tile and the class rows first_row … last_row;
// a warp has ROWS class rows at a time.
template <int ROWS>
SIMT_DEVICE void add_products(const ExitHead& head, const Tiles& tiles, const float* means, int first_channel,
                              int channels, int samples, int first_row, int last_row, float* logits) {
  const int lane = lane_index(), columns = static_cast<int>(head.num_classes) + 1;
  for (int k = first_row + warp_index() * ROWS; k < last_row; k += Tiles::kWarps * ROWS) {
    const float* const weight = head.weight + static_cast<int64_t>(k) * tiles.channels + first_channel;
    float dot[ROWS][Tiles::kMaxSamples] = {};
    for (int c = lane; c < channels; c += 32) {
      float w[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) w[r] = k + r < last_row ? __ldg(weight + int64_t{r} * tiles.channels + c) : 0.f;
#pragma unroll
      for (int s = 0; s < Tiles::kMaxSamples; ++s) {
        if (s < samples) {
          const float mean = means[s * tiles.chunk + c];
#pragma unroll
          for (int r = 0; r < ROWS; ++r) dot[r][s] += w[r] * mean;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float sum = sums_of_warp(dot[r]);
      if (lane < samples && k + r < last_row) {
        float* const logit = logits + static_cast<int64_t>(lane) * columns + k + r;
        *logit = (first_channel == 0 ? __ldg(head.bias + k + r) : *logit) + sum;
      }
    }
  }
}

// The rule's number, in lane 0; the logits become the answer so far.
SIMT_FUNCTION float carry(const ExitHead& head, int64_t position, float* logits) {
  const float* const rule = head.rule;
  const float* const row = head.logits + position * head.logits_row_stride;
  const int classes = static_cast<int>(head.num_classes);
  const float keep_if_same = __ldg(rule + 7), keep_logits = __ldg(rule + 8);
  const int then = keep_if_same != 0 ? class_of(row, classes, head.logits_column_stride) : 0;
  // Every element belongs to one lane: here, in the criterion and where it is written; the number belongs to lane 0.
  for (int k = lane_index(); keep_logits != 0 && k < classes; k += 32)
    logits[k] += keep_logits * row[k * head.logits_column_stride];
  const float sum = weighed(rule, logits, classes);
  if (__ldg(rule + 6) == 0 && keep_if_same == 0) return sum;
  const int now = keep_if_same != 0 ? class_of(logits, classes, 1) : 0;
  return sum + kept(rule, now, then, head.confidence[position * head.confidence_stride]);
}

// One warp decides for one entry of the live list and writes its answer: where it exits, or so far.
template <bool CARRIES>
SIMT_DEVICE void answer(const ExitHead& head, float* logits, int entry, uint8_t* flags) {
  const int classes = static_cast<int>(head.num_classes);
  float confidence = 0;
  if (!CARRIES) confidence = confidence_of(head.criterion, logits, classes);
  const int64_t position = __ldg(head.positions + entry);
  if (position < 0 || position >= head.results) __trap();
  if (CARRIES) confidence = carry(head, position, logits);
  const float* const threshold = head.threshold + (head.threshold_of_each ? position * head.threshold_stride : 0);
  bool leaves = head.threshold == nullptr || leaves_by(head.criterion, confidence, __ldg(threshold));
  if (head.threshold_of_each) leaves = leaves || __ldg(threshold) != __ldg(threshold);
  if (CARRIES || leaves) {
    float* const row = head.logits + position * head.logits_row_stride;
    for (int k = lane_index(); k < classes; k += 32) row[k * head.logits_column_stride] = logits[k];
  }
  if (lane_index() == 0) {
    flags[entry] = !leaves;
    if (CARRIES || leaves) head.confidence[position * head.confidence_stride] = confidence;
    if (leaves) head.exits[position * head.exits_stride] = head.exit_index;
  }
}

// The lowest bit of each of four bytes.
SIMT_DEVICE uint32_t bits_of(uint32_t bytes) { return (bytes & 0x01010101u) * 0x01020408u >> 24; }

// The whole next live list, written by one block; a thread counts the survivors among 32 entries.
SIMT_DEVICE void partition(const ExitHead& head, int count, ExitHeadScratch* scratch) {
  const int lane = lane_index(), warp = warp_index(), size = static_cast<int>(head.size);
  // Volatile: other blocks have written it during this launch.
  const volatile uint32_t* const flags = reinterpret_cast<const uint32_t*>(head.workspace + ExitHead::kFlags);
  int before = 0;
  for (int first = 0; first < size; first += Tiles::kThreads * 32) {
    const int begin = first + static_cast<int>(threadIdx.x) * 32, alive = count - begin;
    uint32_t survivors = 0;
    if (alive > 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) survivors |= bits_of(flags[begin / 4 + i]) << 4 * i;
      if (alive < 32) survivors &= (1u << alive) - 1;
    }
    int up_to = __popc(survivors);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, up_to, distance);
      if (lane >= distance) up_to += other;
    }
    if (lane == 31) scratch->totals[warp] = up_to;
    __syncthreads();  // totals complete; also, every warp is done with the entries before
    int in_front = before;
#pragma unroll
    for (int w = 0; w < Tiles::kWarps; ++w) {
      const int total = scratch->totals[w];
      if (w < warp) in_front += total;
      before += total;
    }
    scratch->survivors[threadIdx.x] = survivors;
    scratch->survivors_before[threadIdx.x] = in_front + up_to - __popc(survivors);
    __syncthreads();  // survivors complete, totals free
    const int words = smaller(Tiles::kThreads, (size - first + 31) / 32);
#pragma unroll 4
    for (int word = warp; word < words; word += Tiles::kWarps) {
      const int entry = first + word * 32 + lane;
      if (entry < size) {
        const uint32_t mask = scratch->survivors[word];
        const int rank = scratch->survivors_before[word] + __popc(mask & ((1u << lane) - 1));
        const int target = mask >> lane & 1 ? rank : size - 1 - (entry - rank);
        head.next_rows[target] = __ldg(head.rows + entry);
        head.next_positions[target] = __ldg(head.positions + entry);
      }
    }
  }
  if (threadIdx.x == 0) *head.next_live = before;
}

// The end of a block of those that decide: the last one writes the next live list.
SIMT_DEVICE void finish(const ExitHead& head, int count, ExitHeadScratch* scratch) {
  __syncthreads();  // the block is done
  if (threadIdx.x == 0) {
    // The flags of this block are to be seen before its ticket.
    __threadfence();
    const bool last = atomicAdd(head.workspace, 1) == static_cast<int>(gridDim.x) - 1;
    // The flags of the other blocks are to be seen after it; the barrier hands that on to all threads.
    __threadfence();
    scratch->last = last;
  }
  __syncthreads();  // it is known whether it was the last one
  if (scratch->last) partition(head, count, scratch);
}

// Entries of the live list that count.
SIMT_DEVICE int entries_of(const ExitHead& head) {
  const int live = __ldg(head.live);
  return live < 0 ? 0 : smaller(live, static_cast<int>(head.size));
}

// The map of an entry, from one of its channels on.
template <class T>
SIMT_DEVICE const T* map_of(const ExitHead& head, const Tiles& tiles, int entry, int first_channel) {
  const int64_t row = __ldg(head.rows + entry);
  if (row < 0 || row >= head.samples) __trap();
  return static_cast<const T*>(head.features) + row * head.sample_stride + first_channel * tiles.channel_stride;
}

// Few classes: all of it.
template <class T, int VECTOR, bool CARRIES>
SIMT_DEVICE void run(const ExitHead& head, const Tiles& tiles, char* shared) {
  ExitHeadScratch* const scratch = reinterpret_cast<ExitHeadScratch*>(shared);
  float* const sums = reinterpret_cast<float*>(scratch + 1);
  float* const means = sums + Tiles::kWarps * tiles.chunk;
  float* const logits = means + tiles.samples * tiles.chunk;
  uint8_t* const flags = reinterpret_cast<uint8_t*>(head.workspace + ExitHead::kFlags);
  const int warp = warp_index(), parts = tiles.warps_per_sample, part = warp & (parts - 1);
  const int count = entries_of(head);
  const float pixels = static_cast<float>(tiles.lines * tiles.columns);

  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const int entry = tile * tiles.samples, samples = smaller(tiles.samples, count - entry);
    if (samples <= 0) break;
    for (int first_channel = 0; first_channel < tiles.channels; first_channel += tiles.chunk) {
      const int channels = smaller(tiles.chunk, tiles.channels - first_channel);
      for (int first = 0; first < samples; first += Tiles::kWarps / parts) {
        const int sample = first + warp / parts;
        if (sample < samples) {
          const T* const map = map_of<T>(head, tiles, entry + sample, first_channel);
          if (tiles.channels_last)
            pool_channels_last<T, VECTOR>(tiles, map, channels, part, sums + warp * tiles.chunk);
          else
            pool_planes<T, VECTOR>(tiles, map, channels, part, sums + (warp - part) * tiles.chunk);
        }
        __syncthreads();  // sums complete; also, every warp is done with the means before
        if (sample < samples) {
          for (int c = part * 32 + lane_index(); c < channels; c += parts * 32) {
            const float* const partials = sums + (warp - part) * tiles.chunk + c;
            float sum = partials[0];
            if (tiles.channels_last)
              for (int other = 1; other < parts; ++other) sum += partials[other * tiles.chunk];
            means[sample * tiles.chunk + c] = sum / pixels;
          }
        }
        __syncthreads();  // means complete, sums free
      }
      const int columns = static_cast<int>(head.num_classes) + 1;
      add_products<1>(head, tiles, means, first_channel, channels, samples, 0, columns, logits);
    }
    __syncthreads();  // logits complete
    if (warp < samples) answer<CARRIES>(head, logits + warp * (head.num_classes + 1), entry + warp, flags);
  }

  finish(head, count, scratch);
}

// Many classes, first: sums over a map, by `blocks_per_sample` blocks. Where channels are adjacent each has some of the
// pixels, else some of the channels.
template <class T, int VECTOR>
SIMT_DEVICE void pool(const ExitHead& head, const Tiles& tiles, char* shared) {
  float* const partials = reinterpret_cast<float*>(shared);
  const int count = entries_of(head), warp = warp_index();
  const int64_t units = static_cast<int64_t>(count) * tiles.blocks_per_sample;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int entry = static_cast<int>(unit / tiles.blocks_per_sample);
    const int block = static_cast<int>(unit % tiles.blocks_per_sample), part = block * Tiles::kWarps + warp;
    float* const sums = head.sums + static_cast<int64_t>(entry) * tiles.sums_per_sample * tiles.channels;
    if (!tiles.channels_last) {
      pool_planes<T, VECTOR>(tiles, map_of<T>(head, tiles, entry, 0), tiles.channels, part, sums);
      continue;
    }
    for (int first_channel = 0; first_channel < tiles.channels; first_channel += tiles.chunk) {
      const int channels = smaller(tiles.chunk, tiles.channels - first_channel);
      const T* const map = map_of<T>(head, tiles, entry, first_channel);
      pool_channels_last<T, VECTOR>(tiles, map, channels, part, partials + warp * tiles.chunk);
      __syncthreads();  // the partial sums of all warps are complete
      for (int c = static_cast<int>(threadIdx.x); c < channels; c += Tiles::kThreads) {
        float sum = partials[c];
        for (int other = 1; other < Tiles::kWarps; ++other) sum += partials[other * tiles.chunk + c];
        sums[static_cast<int64_t>(block) * tiles.channels + first_channel + c] = sum;
      }
      __syncthreads();  // they are free
    }
  }
}

// Many classes, then: the logits of a tile for kBlockRows class rows.
SIMT_DEVICE void classify(const ExitHead& head, const Tiles& tiles, char* shared) {
  float* const means = reinterpret_cast<float*>(shared);
  const int count = entries_of(head), columns = static_cast<int>(head.num_classes) + 1;
  const float pixels = static_cast<float>(tiles.lines * tiles.columns);
  const int64_t units = static_cast<int64_t>(tiles.count) * tiles.class_blocks;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int entry = static_cast<int>(unit / tiles.class_blocks) * tiles.samples;
    const int samples = smaller(tiles.samples, count - entry);
    if (samples <= 0) break;
    const int first_row = static_cast<int>(unit % tiles.class_blocks) * Tiles::kBlockRows;
    for (int first_channel = 0; first_channel < tiles.channels; first_channel += tiles.chunk) {
      const int channels = smaller(tiles.chunk, tiles.channels - first_channel);
      for (int i = static_cast<int>(threadIdx.x); i < samples * channels; i += Tiles::kThreads) {
        const int sample = i / channels, c = i % channels;
        const float* const sums = head.sums +
                                  static_cast<int64_t>(entry + sample) * tiles.sums_per_sample * tiles.channels +
                                  first_channel + c;
        float sum = sums[0];
        for (int other = 1; other < tiles.sums_per_sample; ++other)
          sum += sums[static_cast<int64_t>(other) * tiles.channels];
        means[sample * tiles.chunk + c] = sum / pixels;
      }
      __syncthreads();  // the means are complete
      float* const logits = head.scratch + static_cast<int64_t>(entry) * columns;
      add_products<Tiles::kManyRows>(head, tiles, means, first_channel, channels, samples, first_row,
                                     smaller(first_row + Tiles::kBlockRows, columns), logits);
      __syncthreads();  // they are free
    }
  }
}

// Many classes, last: a warp decides for one entry, on its logits where they are.
template <bool CARRIES>
SIMT_DEVICE void decide(const ExitHead& head, const Tiles& tiles, char* shared) {
  uint8_t* const flags = reinterpret_cast<uint8_t*>(head.workspace + ExitHead::kFlags);
  const int count = entries_of(head), columns = static_cast<int>(head.num_classes) + 1;
  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const int entry = tile * tiles.samples + warp_index();
    if (entry < count) answer<CARRIES>(head, head.scratch + static_cast<int64_t>(entry) * columns, entry, flags);
  }
  finish(head, count, reinterpret_cast<ExitHeadScratch*>(shared));
}

}  // namespace exit_head_kernel
}  // namespace eefast::cuda
