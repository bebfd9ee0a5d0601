// What a launch of the CUDA exit head takes, and how its work is cut into tiles.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "types.h"

namespace eefast::cuda {

struct ExitHead : ExitHeadArguments {  // not float64
  // The live list of the next exit: [size], [size] and [1].
  int32_t* next_rows;
  int32_t* next_positions;
  int32_t* next_live;

  // `workspace_words` int32. The first counts the blocks that are done and must be 0; from kFlags on there is one byte
  // per entry of the live list: whether it survives.
  int32_t* workspace;
  static constexpr int kFlags = 4;
  static int64_t workspace_words(int64_t size) { return kFlags + (size + 31) / 32 * 8; }

  // With many classes, from one launch to the next: `sums_of` floats, and [size][num_classes + 1] logits.
  float* sums;
  float* scratch;
};

constexpr int power_of_two(int64_t least, int most) {
  int power = 1;
  while (power < least && power < most) power *= 2;
  return power;
}

// A thread block takes `samples` entries of the live list at a time. All that could change the order of additions
// depends on the shape and the layout of one sample only: it gets the same bits in every batch and at every address.
struct ExitHeadTiles {
  static constexpr int kThreads = 256, kWarps = kThreads / 32, kMaxSamples = 8, kMaxChunk = 256;
  // Many classes: class rows of a warp at a time, and of a block; blocks that pool one sample at most.
  static constexpr int kManyRows = 4, kBlockRows = kWarps * kManyRows, kMaxBlocks = 8;

  // Of one sample. Lines at even distances are one long line.
  int channels, lines, columns;
  int64_t channel_stride, line_stride, pixel_stride;
  bool channels_last;  // channels are adjacent and fill a vector; else pixels are and do
  bool wide;           // the vector has 16 bytes, else it is one element
  bool many_classes;   // three launches: pooling, logits, decisions; else one
  bool aligned;        // 16 bytes can be loaded at once; else they are gathered, for the same sums
  int lanes;           // that share a line of a plane (else a pixel), a power of two

  int samples, count;    // entries of a tile; tiles
  int warps_per_sample;  // that pool one sample together
  int chunk;             // channels that are pooled at a time
  size_t shared_bytes;

  // With many classes: blocks that pool one sample together, sums of each channel that they leave, blocks that share
  // the class rows of a tile.
  int blocks_per_sample, sums_per_sample, class_blocks;
  size_t pool_bytes, classify_bytes;  // of shared memory; `shared_bytes` is that of the decisions
};

// Before the sums in shared memory.
struct ExitHeadScratch {
  int last;                                     // whether this block ends the launch
  int totals[ExitHeadTiles::kWarps];            // survivors per warp
  uint32_t survivors[ExitHeadTiles::kThreads];  // of 32 entries each
  int survivors_before[ExitHeadTiles::kThreads];
  // With few classes then float sums[kWarps][chunk], means[samples][chunk], logits[samples][num_classes + 1].
};

inline ExitHeadTiles tiles_of(const ExitHead& head) {
  ExitHeadTiles t{};
  const int element = head.dtype == DType::float32 ? 4 : 2, vector = 16 / element;
  t.channels = static_cast<int>(head.channels);
  t.lines = static_cast<int>(head.height);
  t.columns = static_cast<int>(head.width);
  t.channel_stride = head.channel_stride;
  t.line_stride = head.row_stride;
  t.pixel_stride = head.width == 1 ? head.row_stride : head.pixel_stride;
  if (t.columns == 1 || t.lines == 1 || t.line_stride == t.columns * t.pixel_stride) {
    t.columns *= t.lines;
    t.lines = 1;
  }
  t.channels_last = t.channels > 1 && t.channel_stride == 1;
  const int side_by_side = t.channels_last ? t.channels : t.columns;
  t.wide = side_by_side % vector == 0;
  const auto fits = [&](int64_t n, int64_t stride) { return n == 1 || stride * element % 16 == 0; };
  t.aligned =
      reinterpret_cast<uintptr_t>(head.features) % 16 == 0 && fits(head.samples, head.sample_stride) &&
      fits(t.lines, t.line_stride) &&
      (t.channels_last ? fits(t.columns, t.pixel_stride) : t.pixel_stride == 1 && fits(t.channels, t.channel_stride));
  t.many_classes = head.num_classes >= 64;
  t.chunk = std::min(t.channels, ExitHeadTiles::kMaxChunk);
  const int pixels = t.lines * t.columns, group = t.wide ? vector : 1;
  t.lanes = power_of_two((t.channels_last ? t.chunk : t.columns) / group, 32);

  const int64_t sample_bytes = head.channels * pixels * element;
  if (t.many_classes) {
    t.blocks_per_sample = power_of_two((sample_bytes + 65535) / 65536, ExitHeadTiles::kMaxBlocks);
    t.warps_per_sample = t.blocks_per_sample * ExitHeadTiles::kWarps;
    t.sums_per_sample = t.channels_last ? t.blocks_per_sample : 1;
    t.class_blocks = static_cast<int>(head.num_classes / ExitHeadTiles::kBlockRows) + 1;
    t.samples = ExitHeadTiles::kMaxSamples;
    t.count = static_cast<int>((head.size + t.samples - 1) / t.samples);
    t.pool_bytes = ExitHeadTiles::kWarps * t.chunk * sizeof(float);
    t.classify_bytes = t.samples * t.chunk * sizeof(float);
    t.shared_bytes = sizeof(ExitHeadScratch);
    return t;
  }
  t.warps_per_sample = power_of_two((sample_bytes + 8191) / 8192, ExitHeadTiles::kWarps);
  // Large weights are worth sharing: a tile reads them once.
  const bool large = head.channels * (head.num_classes + 1) > 16384;
  t.samples = large ? ExitHeadTiles::kMaxSamples : ExitHeadTiles::kWarps / t.warps_per_sample;
  const int64_t floats = (ExitHeadTiles::kWarps + t.samples) * t.chunk + t.samples * (head.num_classes + 1);
  t.shared_bytes = sizeof(ExitHeadScratch) + floats * sizeof(float);
  t.count = static_cast<int>((head.size + t.samples - 1) / t.samples);
  return t;
}

// Floats of `ExitHead::sums`.
inline int64_t sums_of(const ExitHead& head, const ExitHeadTiles& tiles) {
  return head.size * tiles.sums_per_sample * head.channels;
}

// Queues the kernels on a stream of a device; null, or what went wrong.
const char* launch_exit_head(const ExitHead& head, int device, void* stream);

}  // namespace eefast::cuda
