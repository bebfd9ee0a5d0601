// A whole early-exit network as one persistent kernel: a thread block carries one image at a time to its exit.
//
// Each block takes an image from a queue, keeps its maps in shared memory from the first convolution to the exit it
// takes, writes K logits, the exit and the confidence, and takes the next image. Nothing is compacted, no host read
// happens, no second launch: an image that exits early makes room for another one.
//
// Bytes moved per image: the image in, K + 3 numbers out; weights come from L1 and L2, since all blocks read the same.
//
// A map of C channels is stored in shared memory as [C/8][frame][frame][8] 16-bit numbers, its first pixel at (1, 1):
//   * around it are zeros, so a tap is a constant offset, without bounds checks;
//   * a pixel of a plane is 16 bytes: 8 neighbouring pixels are one matrix of ldmatrix and touch every bank once
//     (stride 2 skips every other pixel: two-way conflicts, in two convolutions per network).
// Pixels of a frame beyond the map hold anything; they reach only sums of pixels beyond the map, which are not stored.
//
// Convolution = matrix product: rows (M) are pixels, columns (N) output channels, depth (K) the input channels under a
// tap. A tile is 16 pixels: one row of 16, or two of 8 in the smallest frame. A warp has 4 rows of pixels, one tile
// wide, and 16 output channels; a fragment of input row y serves all output rows y-2 … y. B, the weights, is packed as
// the lanes hold it: one 16-byte load gives a lane its part of 16 inputs × 16 outputs under one tap,
//   [C_in/16][tap][C_out/16][lane][8]: inputs k, k+1, k+8, k+9 of output n, then of n+8; k = 2·(lane%4), n = lane/4.
#pragma once

#include "cuda/criterion.cuh"
#include "cuda/resident.h"
#include "cuda/simt.h"

namespace eefast::cuda {

constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;  // of output pixels that a warp has
// Whether all input channels of a convolution make one stretch of code; on Blackwell that takes too many registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kUnrolls = false;
#else
constexpr bool kUnrolls = true;
#endif

// Two neighbouring channels of a pixel.
SIMT_DEVICE __half2 pair_of(float2 v, __half) { return __float22half2_rn(v); }
SIMT_DEVICE __nv_bfloat162 pair_of(float2 v, __nv_bfloat16) { return __float22bfloat162_rn(v); }
SIMT_DEVICE float2 floats_of(__half2 v) { return __half22float2(v); }
SIMT_DEVICE float2 floats_of(__nv_bfloat162 v) { return __bfloat1622float2(v); }
template <class T>
using Pair = decltype(pair_of(float2{}, T{}));

// Rounds; with relu, negative values become zero. NaN stays: a maximum that drops it would turn a broken image into a
// plausible answer.
template <class T>
SIMT_DEVICE Pair<T> finished(float x, float y, float least) {
  return __hmax2_nan(pair_of(make_float2(x, y), T{}), pair_of(make_float2(least, least), T{}));
}

template <int SIDE>
struct Frame {
  static constexpr int kPlane = plane_bytes(SIDE);
  static constexpr int kTileRows = SIDE == 10 ? 2 : 1, kTileColumns = 16 / kTileRows, kTiles = kRows / kTileRows;
  SIMT_DEVICE static constexpr int at(int y, int x) { return (y * SIDE + x) * 16; }
};

// Zeros in the frame around a map.
SIMT_FUNCTION void surround(char* map, int planes, int frame, int height, int width) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < planes * frame; i += kThreads) {
    const int plane = i / frame, step = i % frame;
    uint4* const pixels = reinterpret_cast<uint4*>(map) + plane * frame * frame;
    if (step < width + 2) pixels[step] = pixels[(height + 1) * frame + step] = zero;
    if (step < height + 2) pixels[step * frame] = pixels[step * frame + width + 1] = zero;
  }
}

// ---- Pieces of a convolution. acc[m][n] is this lane's share of tile m and 8 channels: elements 0 and 1 are pixel
//      lane/4, elements 2 and 3 pixel lane/4 + 8, both for channels 2·(lane%4) and the next one.

struct Item {  // what a warp computes at a time
  int row, column, block;
};

template <int SIDE>
SIMT_DEVICE int item_count(Step step) {
  const int columns = SIDE == 34 ? (step.width + 15) / 16 : 1;
  return (step.height + kRows - 1) / kRows * columns * (step.planes / 2);
}

template <int SIDE>
SIMT_DEVICE Item item_of(Step step, int blocks, int index) {
  const int place = index / blocks, block = index - place * blocks;
  if (SIDE != 34) return {place * kRows, 0, block};
  const int two = step.width > 16;  // tiles side by side
  return {(place >> two) * kRows, (place & two) * 16, block};
}

template <int TILES>
SIMT_DEVICE void start_with_bias(float (&acc)[TILES][2][4], const uint4* __restrict__ bias, int block) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float2* const pairs = reinterpret_cast<const float2*>(bias) + (block * 16 + n * 8) / 2;
    const float2 pair = __ldg(pairs + lane_index() % 4);
#pragma unroll
    for (int m = 0; m < TILES; ++m) acc[m][n][0] = acc[m][n][2] = pair.x, acc[m][n][1] = acc[m][n][3] = pair.y;
  }
}

template <class T>
SIMT_DEVICE void multiply(float (&acc)[2][4], const uint32_t (&pixels)[4], const uint4& weight) {
  multiply_add(acc[0], pixels, weight.x, weight.y, T{});
  multiply_add(acc[1], pixels, weight.z, weight.w, T{});
}

// target = relu(acc + residual), rounded once. Where the residual is the target, each element is read and then written
// by one and the same thread.
template <class T, int SIDE, bool ADDS, int TILES>
SIMT_DEVICE void store_sum(const float (&acc)[TILES][2][4], Step step, char* shared, const Item& item) {
  using F = Frame<SIDE>;
  const float least = step.relu ? 0.f : -INFINITY;
  const int lane = lane_index(), first = lane / 4;
  const int place = item.block * 2 * F::kPlane + F::at(item.row + 1, item.column + 1) + first * 16 + lane % 4 * 4;
  char* const out = shared + step.target * 16 + place;
  const char* const residual = shared + step.residual * 16 + place;
#pragma unroll
  for (int m = 0; m < TILES; ++m)
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      // Pixels lane/4 and lane/4 + 8 of a tile: the right half of its row, or its second row.
      const int dy = m * F::kTileRows + (F::kTileRows == 2 ? lower : 0), dx = F::kTileRows == 2 ? 0 : lower * 8;
      // Beyond the map there is room in the frame: reading there does no harm.
      const bool inside = item.row + dy < step.height && item.column + dx + first < step.width;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int at = F::at(dy, dx) + n * F::kPlane;
        float2 v = make_float2(acc[m][n][2 * lower], acc[m][n][2 * lower + 1]);
        if (ADDS) {
          const float2 old = floats_of(*reinterpret_cast<const Pair<T>*>(residual + at));
          v.x += old.x, v.y += old.y;
        }
        const Pair<T> sum = finished<T>(v.x, v.y, least);
        if (inside) *reinterpret_cast<Pair<T>*>(out + at) = sum;
      }
    }
}

template <class T, int SIDE, int TILES>
SIMT_DEVICE void store(const float (&acc)[TILES][2][4], Step step, char* shared, const Item& item) {
  if (step.residual == kNone)
    store_sum<T, SIDE, false>(acc, step, shared, item);
  else
    store_sum<T, SIDE, true>(acc, step, shared, item);
}

// ---- Layers. The caller puts barriers between them; only `leaves_at` contains any.

template <int TAPS>
SIMT_DEVICE void load_weights(uint4 (&w)[TAPS], const uint4* __restrict__ weight, int blocks_out) {
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap) w[tap] = __ldg(weight + tap * blocks_out * 32);
}

// 3×3 or 1×1 convolution; BLOCKS: of 16 channels in and out, 0 where the compiler is not to know.
template <class T, int IN, int OUT, int STRIDE, int TAPS, int BLOCKS>
SIMT_FUNCTION void convolve(Step step, char* shared, const uint4* __restrict__ packed) {
  using F = Frame<OUT>;
  const int lane = lane_index(), blocks_in = BLOCKS ? BLOCKS : step.source_planes / 2;
  const int blocks_out = BLOCKS ? BLOCKS : step.planes / 2;
  const uint4* const bias = packed + step.weight;
  const int items = item_count<OUT>(step), pixel = lane % 16;
  uint4 all[BLOCKS == 1 ? TAPS : 1];  // weights that serve every pixel
  if constexpr (BLOCKS == 1) load_weights(all, bias + 4 + lane, 1);
#pragma unroll 1
  for (int index = warp_index(); index < items; index += kWarps) {
    const Item item = item_of<OUT>(step, blocks_out, index);
    float acc[F::kTiles][2][4];
    start_with_bias(acc, bias, item.block);
    // ldmatrix wants from lane l the pixel l%16 of the tile, in the lower plane (l < 16) or the upper one.
    const int y = item.row + pixel / F::kTileColumns, x = item.column + pixel % F::kTileColumns;
    const char* corner =
        shared + step.source * 16 + lane / 16 * Frame<IN>::kPlane + Frame<IN>::at(y * STRIDE, x * STRIDE);
    const uint4* weight = bias + blocks_out * 4 + item.block * 32 + lane;
#pragma unroll(kUnrolls&& BLOCKS ? BLOCKS : 1)
    for (int k = 0; k < blocks_in; ++k) {
      uint4 block_weights[TAPS];
      if constexpr (BLOCKS != 1) load_weights(block_weights, weight, blocks_out);
      const uint4* const w = BLOCKS == 1 ? all : block_weights;
      weight += TAPS * blocks_out * 32;
      uint32_t pixels[4];
      if constexpr (STRIDE == 1 && TAPS == 9) {
#pragma unroll
        for (int s = 0; s < kRows - F::kTileRows + 3; ++s)  // input rows, counted in the frame from the warp's first
#pragma unroll
          for (int dx = 0; dx < 3; ++dx) {
            load_matrices(pixels, corner + Frame<IN>::at(s, dx));
#pragma unroll
            for (int m = 0; m < F::kTiles; ++m) {
              const int dy = s - m * F::kTileRows;
              if (dy >= 0 && dy < 3) multiply<T>(acc[m], pixels, w[dy * 3 + dx]);
            }
          }
      } else {
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap)
#pragma unroll
          for (int m = 0; m < F::kTiles; ++m) {
            const int dy = TAPS == 9 ? tap / 3 : 1, dx = TAPS == 9 ? tap % 3 : 1;
            load_matrices(pixels, corner + Frame<IN>::at(dy + m * F::kTileRows * STRIDE, dx));
            multiply<T>(acc[m], pixels, w[tap]);
          }
      }
      corner += 2 * Frame<IN>::kPlane;
    }
    store<T, OUT>(acc, step, shared, item);
  }
}

// 3×3 convolution of the image, whose up to eight channels are one plane: a depth of 16 holds two taps, lanes 0-15
// address one, lanes 16-31 the next. There is no tenth tap: its weights are zero and it reads what surrounds the image.
template <class T, int SIDE>
SIMT_FUNCTION void convolve_image(Step step, char* shared, const uint4* __restrict__ packed) {
  using F = Frame<SIDE>;
  const int lane = lane_index(), blocks_out = step.planes / 2, items = item_count<SIDE>(step), pixel = lane % 16;
  const uint4* const bias = packed + step.weight;
#pragma unroll 1
  for (int index = warp_index(); index < items; index += kWarps) {
    const Item item = item_of<SIDE>(step, blocks_out, index);
    float acc[F::kTiles][2][4];
    start_with_bias(acc, bias, item.block);
    const uint4* const weight = bias + blocks_out * 4 + item.block * 32 + lane;
    const int y = item.row + pixel / F::kTileColumns, x = item.column + pixel % F::kTileColumns;
    const char* const image = shared + step.source * 16;
#pragma unroll
    for (int k = 0; k < 5; ++k) {
      const uint4 w = __ldg(weight + k * blocks_out * 32);
      const int tap = 2 * k + lane / 16;
#pragma unroll
      for (int m = 0; m < F::kTiles; ++m) {
        const int place = F::at(y + m * F::kTileRows + tap / 3, x + tap % 3);
        uint32_t pixels[4];
        load_matrices(pixels, image + (tap < 9 ? place : 0));
        multiply<T>(acc[m], pixels, w);
      }
    }
    store<T, SIDE>(acc, step, shared, item);
  }
}

// target = relu(source · scale + shift): a BatchNorm that no convolution could take.
template <class T>
SIMT_FUNCTION void scale_and_shift(Step step, char* shared, const uint4* __restrict__ packed) {
  const float* const shift = reinterpret_cast<const float*>(packed + step.weight);
  const float* const scale = shift + step.planes * 8;
  const float least = step.relu ? 0.f : -INFINITY;
  const int pixels = step.height * step.width, size = step.frame * step.frame * 16;
  for (int i = threadIdx.x; i < step.planes * pixels; i += kThreads) {
    const int plane = i / pixels, pixel = i - plane * pixels, y = pixel / step.width, x = pixel - y * step.width;
    const int place = plane * size + ((y + 1) * step.frame + x + 1) * 16;
    uint4 value = *reinterpret_cast<const uint4*>(shared + step.source * 16 + place);
    Pair<T>* const pairs = reinterpret_cast<Pair<T>*>(&value);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = plane * 8 + 2 * j;
      const float2 v = floats_of(pairs[j]);
      pairs[j] = finished<T>(v.x * __ldg(scale + c) + __ldg(shift + c),
                             v.y * __ldg(scale + c + 1) + __ldg(shift + c + 1), least);
    }
    *reinterpret_cast<uint4*>(shared + step.target * 16 + place) = value;
  }
}

// Eight channels of a pixel, as floats.
template <class T>
SIMT_DEVICE void add_pixel(float (&sum)[8], const void* pixel) {
  const uint4 value = *reinterpret_cast<const uint4*>(pixel);
  const Pair<T>* const pairs = reinterpret_cast<const Pair<T>*>(&value);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 v = floats_of(pairs[j]);
    sum[2 * j] += v.x, sum[2 * j + 1] += v.y;
  }
}

// Mean of the map, K logits and the confidence; whether the image exits, and then its answer is written. All threads
// return the same. Every sum has a fixed order, so that no image near a threshold can flip. No barrier at the end: what
// is written next comes after a later one, except scratch->image. CARRIES: whether there is a rule; the answer so far
// then is in scratch, so that nothing but the final answer goes to memory.
template <class T, bool CARRIES>
SIMT_FUNCTION bool leaves_at(Step step, const Job& job, char* shared) {
  const Network& network = job.network;
  const Batch& batch = job.batch;
  Scratch* const scratch = reinterpret_cast<Scratch*>(shared + network.map_bytes);
  const int image = scratch->image;  // before the barriers, after which it may already be the next one
  const int lane = lane_index(), warp = warp_index(), classes = network.classes, channels = step.source_planes * 8;
  const float* const bias = reinterpret_cast<const float*>(static_cast<const uint4*>(network.packed) + step.weight);
  const float* const weight = bias + (classes + 1 + 15) / 16 * 16;
  const float* const rule = CARRIES ? network.rule + step.exit * kRuleNumbers : nullptr;
  const int planes = step.source_planes, parts = planes <= 2 ? 4 : planes <= 4 ? 2 : 1;
  const int columns = step.source_frame - 2, rows = 32 / columns;  // of pixels that a warp reads at a time
  for (int i = warp; i < planes * parts; i += kWarps) {
    const int plane = i / parts, part = i - plane * parts, x = lane % columns;
    const char* const pixels = shared + step.source * 16 + plane * step.source_frame * step.source_frame * 16;
    float sum[8] = {};
    for (int y = part * rows + lane / columns; y < step.height; y += parts * rows)
      if (x < step.width) add_pixel<T>(sum, pixels + ((y + 1) * step.source_frame + x + 1) * 16);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float total = sum_of_warp(sum[c]);
      if (lane == 0) scratch->sums[i][c] = total;
    }
  }
  __syncthreads();  // sums complete
  const float number_before = CARRIES ? scratch->number : 0.f;
  const int best_before = CARRIES ? scratch->best : 0;
  for (int c = threadIdx.x; c < channels; c += kThreads) {
    float total = 0;
    for (int part = 0; part < parts; ++part) total += scratch->sums[c / 8 * parts + part][c % 8];
    scratch->means[c] = total / static_cast<float>(step.height * step.width);
  }
  __syncthreads();                                 // means complete
  for (int k = warp; k <= classes; k += kWarps) {  // a warp per logit; the last is the confidence
    float dot = 0;
    for (int c = lane; c < channels; c += 32) dot += scratch->means[c] * __ldg(weight + k * channels + c);
    dot = sum_of_warp(dot);
    if (lane == 0) {
      dot += __ldg(bias + k);
      if (CARRIES && k < classes && __ldg(rule + 8) != 0) dot += __ldg(rule + 8) * scratch->logits[k];
      scratch->logits[k] = dot;
    }
  }
  __syncthreads();  // logits complete

  float confidence;
  if constexpr (CARRIES) {
    const int best = class_of(scratch->logits, classes, 1);
    confidence = weighed(rule, scratch->logits, classes);
    if (__ldg(rule + 6) != 0 || __ldg(rule + 7) != 0) confidence += kept(rule, best, best_before, number_before);
    if (threadIdx.x == 0) scratch->number = confidence, scratch->best = best;
  } else {
    confidence = confidence_of(network.criterion, scratch->logits, classes);
  }
  const float* const threshold =
      network.thresholds + step.exit * network.threshold_stride + image * network.threshold_image_stride;
  bool leaves = step.last || leaves_by(network.criterion, confidence, __ldg(threshold));
  if (network.thresholds_of_each && !step.last) leaves = leaves || __ldg(threshold) != __ldg(threshold);
  if (leaves) {
    float* const logits = batch.logits + static_cast<int64_t>(image) * classes;
    for (int k = threadIdx.x; k < classes; k += kThreads) logits[k] = scratch->logits[k];
    if (threadIdx.x == 0) batch.exits[image] = step.exit, batch.confidence[image] = confidence;
  }
  return leaves;
}

SIMT_DEVICE float pixel_at(const void* images, Pixel type, int64_t i) {
  if (type == Pixel::float32) return static_cast<const float*>(images)[i];
  if (type == Pixel::float16) return __half2float(static_cast<const __half*>(images)[i]);
  if (type == Pixel::bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(images)[i]);
  return static_cast<float>(static_cast<const uint8_t*>(images)[i]);
}

// Image → one plane of eight channels, normalised where it is asked for; missing channels are zero.
template <class T>
SIMT_FUNCTION void load_image(const Job& job, char* shared) {
  const Network& network = job.network;
  const Batch& batch = job.batch;
  const int frame = network.image_frame;
  char* const map = shared + network.image;
  const int image = reinterpret_cast<const Scratch*>(shared + network.map_bytes)->image;
  const int64_t first = image * batch.strides[0];
  for (int p = threadIdx.x; p < batch.height * batch.width; p += kThreads) {
    const int y = p / batch.width, x = p - y * batch.width;
    float v[kMaxImageChannels];
#pragma unroll
    for (int c = 0; c < kMaxImageChannels; ++c) {
      v[c] = 0;
      if (c < batch.channels) {
        v[c] = pixel_at(batch.images, batch.pixel,
                        first + c * batch.strides[1] + y * batch.strides[2] + x * batch.strides[3]);
        if (batch.normalization != nullptr)
          v[c] = v[c] * __ldg(batch.normalization + c) + __ldg(batch.normalization + batch.channels + c);
      }
    }
    uint4 value;
    Pair<T>* const pairs = reinterpret_cast<Pair<T>*>(&value);
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = pair_of(make_float2(v[2 * j], v[2 * j + 1]), T{});
    *reinterpret_cast<uint4*>(map + ((y + 1) * frame + x + 1) * 16) = value;
  }
}

template <class T>
SIMT_DEVICE void run(Step step, char* shared, const uint4* packed) {
  const int frame = step.frame, from = step.source_frame;
  if (step.clear) surround(shared + step.target * 16, step.planes, frame, step.height, step.width);
  // clang-format off: one line per function.
  switch (step.action) {
    case Action::convolution_16: convolve<T, 34, 34, 1, 9, 1>(step, shared, packed); break;
    case Action::convolution_32: convolve<T, 18, 18, 1, 9, 2>(step, shared, packed); break;
    case Action::convolution_64: convolve<T, 10, 10, 1, 9, 4>(step, shared, packed); break;
    case Action::convolution:
      if (frame == 34) convolve<T, 34, 34, 1, 9, 0>(step, shared, packed);
      else if (frame == 18) convolve<T, 18, 18, 1, 9, 0>(step, shared, packed);
      else convolve<T, 10, 10, 1, 9, 0>(step, shared, packed);
      break;
    case Action::convolution_down:
      if (frame == 18) convolve<T, 34, 18, 2, 9, 0>(step, shared, packed);
      else if (from == 18) convolve<T, 18, 10, 2, 9, 0>(step, shared, packed);
      else convolve<T, 10, 10, 2, 9, 0>(step, shared, packed);
      break;
    case Action::projection_down:
      if (frame == 18) convolve<T, 34, 18, 2, 1, 0>(step, shared, packed);
      else if (from == 18) convolve<T, 18, 10, 2, 1, 0>(step, shared, packed);
      else convolve<T, 10, 10, 2, 1, 0>(step, shared, packed);
      break;
    case Action::affine: scale_and_shift<T>(step, shared, packed); break;
    case Action::stem:
      if (frame == 34) convolve_image<T, 34>(step, shared, packed);
      else if (frame == 18) convolve_image<T, 18>(step, shared, packed);
      else convolve_image<T, 10>(step, shared, packed);
      break;
    case Action::exit: break;
  }
  // clang-format on
}

template <class T, bool CARRIES>
SIMT_DEVICE void resident(const Job& job, char* shared) {
  const Network& network = job.network;
  const Batch& batch = job.batch;
  Scratch* const scratch = reinterpret_cast<Scratch*>(shared + network.map_bytes);
  const uint4* const packed = static_cast<const uint4*>(network.packed);
  for (;;) {
    if (threadIdx.x == 0) scratch->image = atomicAdd(batch.next, 1);
    __syncthreads();  // the image is known; also, every warp is done with the one before
    if (scratch->image >= batch.count) return;
    surround(shared + network.image, 1, network.image_frame, batch.height, batch.width);
    load_image<T>(job, shared);
    __syncthreads();                                  // image complete
    for (const Step* next = network.step;; ++next) {  // the last step is the final exit
      const Step step = *next;
      if (step.action == Action::exit) {
        if (leaves_at<T, CARRIES>(step, job, shared)) break;
      } else {
        run<T>(step, shared, packed);
        __syncthreads();  // target complete, source free
      }
    }
  }
}

}  // namespace eefast::cuda
