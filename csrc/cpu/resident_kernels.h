// What the resident engine calls, one table per instruction set and element type.
#pragma once

#include "cpu/resident.h"

namespace eefast::cpu {

// Some tiles of one tile row: where they read, where they write, how much of the last ones is inside the map.
struct TileRow {
  const float* in;
  float* out;
  const float* residual;
  int64_t tiles;
  int64_t rows, columns;
};

// Planes of transformed pixels that an int8 Winograd convolution keeps: of four rows the four along x, then the sixteen
// along both axes. Bytes of each: vectors may reach over its end.
constexpr int64_t kTransformedRows = 4, kTransformedPlanes = 4 * kTransformedRows + 16;
inline int64_t transformed_plane(const Map& from) { return round_up((from.width + 1) / 2, 4) * from.block + kLine; }

// Samples whose logits are computed together.
constexpr int64_t kExitSamples = 4;

// Samples whose vectors are multiplied by a matrix together.
constexpr int64_t kVectorSamples = 3;

struct Kernels {
  // Output rows [begin, end) of one group of output channels: direct convolution; in int8 also Winograd. scratch: in
  // int8 of kTransformedPlanes · transformed_plane(from) bytes.
  void (*rows)(const Step& step, const Map& from, const Map& to, const void* in, void* out, const void* residual,
               int64_t group, int64_t begin, int64_t end, void* scratch);
  // The same for sums of any size; null where there are no others.
  decltype(rows) huge_rows;
  // The same for one unit of a grouped convolution, for one block of one of narrow groups, of a depthwise one; null in
  // int8.
  decltype(rows) grouped;
  decltype(rows) narrow;
  decltype(rows) depthwise;
  // 1×1 convolutions of all maps of 1 … kVectorSamples samples that have one pixel, one group of output channels; null
  // but in float32.
  void (*vector)(const Step& step, const Map& from, const Map& to, int64_t samples, const float* const* in,
                 float* const* out, int64_t group);
  // 1×1 convolutions of stride 1, pixels [begin, end) of all samples, counted through all maps; one group of output
  // channels; null in int8.
  void (*points)(const Step& step, const Map& from, const Map& to, const void* const* in, void* const* out,
                 const void* const* residual, int64_t group, int64_t begin, int64_t end);
  // The three parts of a Winograd convolution; null in int8. v: [frequency][block][tile][16], one frequency every
  // `pitch` floats, one block every `block_pitch`; at the first tile of the row.
  void (*winograd_input)(const Step& step, const Map& from, const TileRow& row, int64_t block, float* v, int64_t pitch);
  void (*winograd_multiply)(const Step& step, const Map& from, const Map& to, int64_t frequency, int64_t tiles,
                            const float* v, float* product, int64_t block_pitch);
  void (*winograd_output)(const Step& step, const Map& to, const TileRow& row, int64_t block, const float* product,
                          int64_t pitch);
  // Of tiles that are one row high instead of the last two, null where vectors are narrow: block `block` of the
  // outputs. v: [block][tile][frequency][16], one block every `block_pitch`, as winograd_input then writes it.
  void (*winograd_line)(const Step& step, const Map& from, const Map& to, const TileRow& row, int64_t block,
                        const float* v, int64_t block_pitch);
  // Output channels that one register block holds: up to there the product may take the place of its input.
  int64_t winograd_in_place;

  // Blocks [begin, end) of `from`, of an affine map of `to`. other: the map of the residual.
  void (*affine)(const Step& step, const Map& from, const Map& to, const Map& other, const void* in, void* out,
                 const void* residual, int64_t begin, int64_t end);
  decltype(affine) max_pool;
  decltype(affine) mean;
  decltype(affine) scale;
  decltype(affine) join;
  // An exit in three parts. What it reads of a sample's map, `size` numbers; the logits of 1 … kExitSamples samples,
  // blocks [begin, end) of 16 of them; confidence of one sample, true where it exits.
  void (*exit_values)(const Step& step, const Map& map, const void* in, float* values);
  void (*exit_logits)(const Step& step, int64_t size, int64_t samples, const float* values, int64_t pitch,
                      float* logits, int64_t logits_pitch, int64_t begin, int64_t end);
  bool (*exit)(const Network& network, const float* threshold, float* logits, float* confidence);
  // Instead, with a rule: see criterion_lanes.h.
  float (*carry)(const float* rule, int64_t num_classes, float* logits, const float* before, int64_t stride,
                 const float* value_before);
};

// One row of 1 … 4 channels of an image → pixels of four codes: see int8_lanes.h. Whether any number was NaN.
using ImageRow = bool (*)(const float* const* rows, int64_t channels, int64_t n, const float* multipliers,
                          const float* shifts, uint8_t* out);

const Kernels& select_kernels(Precision precision);
const Kernels& select_int8_kernels();
ImageRow select_image_row();

}  // namespace eefast::cpu
