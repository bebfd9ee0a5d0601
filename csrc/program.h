// A network as the resident engines run it: steps on small maps, in sections.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "types.h"

namespace eefast {

// Bytes of a cache line.
constexpr int64_t kLine = 64;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Adjacent channels of one pixel; the unit of every map but the images.
constexpr int64_t kBlock = 16;

// What maps hold; weights are of the same kind, in int8 signed, while maps hold unsigned codes 0 … 255.
enum class Precision { float32, bfloat16, int8 };

inline int64_t bytes_of(Precision precision) {
  return precision == Precision::int8 ? 1 : precision == Precision::bfloat16 ? 2 : 4;
}

// A map in memory: [blocks][height + 2 halo][row_pitch], each row holding pixels of `block` channels. What surrounds
// the map is zero, so that no kernel asks whether a pixel exists. Pitches in elements.
//
// In int8 one row of memory holds pixels of all channels, the first one at the start of a cache line: the blocks of a
// pixel are side by side, `block_pitch` = 16 apart, and what surrounds the map is the code that means zero.
struct Map {
  int64_t channels, section, zero;
  bool pooled;  // one pixel, made by averaging a map
  int64_t block, blocks, height, width, halo;
  int64_t row_pitch, block_pitch;
  int64_t left;    // elements of a row before its first pixel
  int64_t size;    // elements
  int64_t offset;  // bytes from the start of its slot

  int64_t at(int64_t y, int64_t x) const { return (y + halo) * row_pitch + left + x * block; }
};

enum class Kind { convolution, affine, max_pool, exit, mean, scale, join, load, store };
constexpr int64_t kKinds = 9;
enum class Activation { none, relu, relu6, silu, hardswish, hardsigmoid, sigmoid, gelu };
constexpr int64_t kActivations = 8;

struct Step {
  Kind kind;
  // Maps; the target of an exit is its number, that of a store is -1.
  int64_t source, target, residual;
  bool relu, flatten;
  // Another one than ReLU, which is part of every kernel.
  Activation activation;
  int64_t kernel, stride, padding;
  // Rows of a window and of padding above it: kernel and padding, of one-dimensional windows 1 and 0.
  int64_t rows, above;
  // Of a convolution; 0 and 1 say the same. The first channel that a join writes.
  int64_t groups, channel;
  // 0: direct; m: Winograd F(m×m, 3×3), of one-dimensional windows F(m, 3); in int8 along m axes, F(2, 3) or
  // F(2×2, 3×3).
  int64_t winograd;
  int64_t section;
  bool entry;
  // Whether a sum of an int8 convolution may be 2^31 outputs or more.
  bool huge;
  // Row of the table that it comes from, and where its weights are in `packed`.
  int64_t row, place;
  // Back to back in memory: bias, padded to blocks, then weights in the order in which the kernels read. In int8
  // convolutions what stands between them is told by eefast/ops/resident_int8.py.
  const float* bias;
  const float* weight;
};

// Whether every channel of a convolution is computed from one channel, of the same number.
inline bool is_depthwise(const Step& step, const Map& from, const Map& to) {
  return step.groups > 1 && step.groups == from.channels && step.groups == to.channels;
}

// What a unit of output channels of a grouped convolution is computed from: see eefast/planning/weight_order.py.
inline int64_t grouped_width(const Step& step, const Map& to) {
  return to.blocks % 2 == 0 && to.channels / step.groups % 32 == 0 ? 32 : 16;
}
// Channels of the groups of a convolution whose groups lie inside of blocks and have as many outputs as inputs, else 0.
inline int64_t narrow_groups(const Step& step, const Map& from, const Map& to) {
  const int64_t inputs = step.groups > 1 ? from.channels / step.groups : 0;
  const bool narrow = inputs == 2 || inputs == 4 || inputs == 8;
  return narrow && from.channels == to.channels ? inputs : 0;
}
struct GroupedUnit {
  int64_t begin, channels;  // of the inputs; begin is the first of its block
};
inline GroupedUnit grouped_unit(const Step& step, const Map& from, const Map& to, int64_t unit) {
  const int64_t width = grouped_width(step, to), outputs = to.channels / step.groups;
  const int64_t inputs = from.channels / step.groups, end = std::min(to.channels, (unit + 1) * width);
  const int64_t begin = unit * width / outputs * inputs / kBlock * kBlock;
  return {begin, ((end - 1) / outputs + 1) * inputs - begin};
}

// Output channels that a row of packed weights holds; see eefast/planning/packing.py.
inline int64_t direct_width(int64_t blocks) { return blocks % 2 == 0 ? 32 : 16; }
inline int64_t winograd_width(int64_t blocks) { return blocks % 4 == 0 ? 64 : blocks % 2 == 0 ? 32 : 16; }

// Products for one tile, input and output channel of a float Winograd convolution: along both axes, or along rows.
inline int64_t frequencies_of(const Step& step) {
  const int64_t side = step.winograd + 2;
  return step.rows == 1 ? side : side * side;
}

// Rows of numbers from which the sums of an int8 convolution start.
inline int64_t int8_starts(const Step& step) { return step.winograd == 2 ? 4 : 2; }

// Weights for one input and one output channel.
inline int64_t int8_taps(const Step& step) {
  return step.winograd == 2 ? 16 : step.winograd == 1 ? 12 : step.rows * step.kernel;
}

// Floats of packed weights of one input of a float convolution, for each output.
inline int64_t direct_depth(const Step& step, Precision precision, const Map& from, int64_t channels) {
  const bool pairs = precision == Precision::bfloat16 && from.block != 1;
  return step.rows * step.kernel * (pairs ? (channels + 1) / 2 : channels);
}

// Floats of packed weights, without the bias.
int64_t packed_size(const Step& step, const std::vector<Map>& maps, int64_t num_classes, Precision precision);

// The layers that work at one map size. A sample takes a slot with room for all its maps here.
struct Section {
  int64_t group;
  int64_t slot_size = 0;  // bytes
  std::vector<Step> entry, body;
};

struct Network {
  Precision precision;
  int64_t num_classes;
  Criterion criterion;
  std::vector<Map> maps;  // maps[0]: the image, as planes; or features, which the first step loads
  std::vector<Section> sections;
  bool loads = false;     // features, by its first step; nothing else reads map 0
  int64_t stored = -1;    // the map that the last step stores, of samples that no exit has answered; -1: none
  int64_t num_exits = 0;  // early ones; unless a map is stored there is a final one with this number
};

// Sizes of all maps from those of the image, places of maps in their slots; null, or what images of this size do wrong.
const char* lay_out(Network& network, int64_t height, int64_t width);

}  // namespace eefast
