// The resident engine behind raw pointers: a network as steps on small maps, the batch it runs on, the answers it
// writes.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/exit_head.h"
#include "cpu/instruction_set.h"

namespace eefast::cpu {

// Channels that lie side by side for one pixel; the unit of every map but the images.
constexpr int64_t kBlock = 16;

// A map in memory: [blocks][height + 2 halo][row_pitch], each row holding pixels of `block` channels. What surrounds
// the map is zero, so that no kernel asks whether a pixel exists. Pitches in elements.
struct Map {
  int64_t channels, section;
  int64_t block, blocks, height, width, halo;
  int64_t row_pitch, block_pitch;
  int64_t offset;  // bytes from the start of its slot

  int64_t at(int64_t y, int64_t x) const { return (y + halo) * row_pitch + (x + halo) * block; }
};

enum class Kind { convolution, affine, max_pool, exit };

struct Step {
  Kind kind;
  // Maps; the target of an exit is its number.
  int64_t source, target, residual;
  bool relu, flatten;
  int64_t kernel, stride, padding;
  // 0: direct; m: Winograd F(m×m, 3×3).
  int64_t winograd;
  int64_t section;
  bool entry;
  // Row of the table that it comes from, and where its weights lie in `packed`.
  int64_t row, place;
  // Behind one another in memory: bias, padded to blocks, then weights in the order in which the kernels read.
  const float* bias;
  const float* weight;
};

// Output channels that a row of packed weights holds; see eefast/pack.py.
inline int64_t direct_width(int64_t blocks) { return blocks % 2 == 0 ? 32 : 16; }
inline int64_t winograd_width(int64_t blocks) { return blocks % 4 == 0 ? 64 : blocks % 2 == 0 ? 32 : 16; }

// Floats of packed weights, without the bias.
int64_t packed_size(const Step& step, const std::vector<Map>& maps, int64_t num_classes, bool bfloat16);

// The layers that work at one map size. A sample takes a slot with room for all its maps here.
struct Section {
  int64_t group;
  int64_t slot_size = 0;  // bytes
  std::vector<Step> entry, body;
};

struct Network {
  bool bfloat16;
  int64_t num_classes;
  Criterion criterion;
  std::vector<Map> maps;  // maps[0]: the image, as planes
  std::vector<Section> sections;
};

struct Batch {
  // [samples, channels, height, width] float32; strides in elements, any values.
  const float* images;
  int64_t samples;
  int64_t strides[4];
  const float* thresholds;
  float* logits;
  float* confidence;
  int64_t* exits;
  // Processor seconds spent in each section, or null; only with one thread.
  double* seconds;
};

// Sizes of all maps from those of the image, places of maps in their slots; null, or what images of this size do wrong.
const char* lay_out(Network& network, int64_t height, int64_t width);

// Runs work(i) for all i in [0, n), as far as possible at the same time.
using Parallel = void (*)(int64_t n, void (*work)(int64_t i, void* context), void* context);

// Answers the batch with `threads` workers. The answer of a sample depends on nothing but the sample.
void resident_forward(const Network& network, const Batch& batch, int64_t threads, Parallel parallel);

}  // namespace eefast::cpu
