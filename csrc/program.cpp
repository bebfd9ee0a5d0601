// Sizes a network's maps and packed weights, places its maps in memory.
#include "program.h"

#include <algorithm>

namespace eefast {
namespace {

// Far beyond all use; below them no product of sizes exceeds 64 bits.
constexpr int64_t kLongestSide = 1 << 15, kMostElements = int64_t{1} << 40;

// Block sizes and pitches of a map whose sizes are known.
void place_pixels(Map& map, Precision precision, bool image) {
  if (precision == Precision::int8) {
    map.block = round_up(map.channels, image ? 4 : kBlock);
    map.blocks = (map.channels + kBlock - 1) / kBlock;
    map.block_pitch = kBlock;
    // What lies after a row lies before the next, too, except in an image, whose zero differs from channel to channel.
    // Tiles of two reach one pixel over an odd edge.
    const int64_t between = image ? 2 * map.halo : std::max(map.halo, 1 + map.width % 2);
    map.left = round_up(map.halo * map.block, kLine);
    map.row_pitch = round_up((map.width + between) * map.block, kLine);
    map.size = (map.height + 2 * map.halo) * map.row_pitch + map.left;
    return;
  }
  map.block = image ? 1 : kBlock;
  map.blocks = (map.channels + map.block - 1) / map.block;
  // Tiles that reach over the edge read zeros there.
  const int64_t tall = std::max(map.height + 2 * map.halo, map.halo + round_up(map.height, 4) + 1);
  const int64_t wide = std::max(map.width + 2 * map.halo, map.halo + round_up(map.width, 4) + 1);
  map.left = map.halo * map.block;
  map.row_pitch = wide * map.block;
  map.block_pitch = tall * map.row_pitch;
  map.size = map.blocks * map.block_pitch;
}

}  // namespace

int64_t packed_size(const Step& step, const std::vector<Map>& maps, int64_t num_classes, Precision precision) {
  const Map& from = maps[step.source];
  switch (step.kind) {
    case Kind::affine: return maps[step.target].blocks * kBlock;
    case Kind::max_pool:
    case Kind::mean:
    case Kind::scale:
    case Kind::join:
    case Kind::load:
    case Kind::store: return 0;
    case Kind::exit: {
      const int64_t pixels = step.flatten ? from.height * from.width : 1;
      return from.blocks * kBlock * pixels * round_up(num_classes + 1, kBlock);
    }
    case Kind::convolution: break;
  }
  const Map& to = maps[step.target];
  const int64_t outputs = to.blocks * kBlock;
  if (is_depthwise(step, from, to)) return step.rows * step.kernel * outputs;
  if (const int64_t narrow = narrow_groups(step, from, to)) return step.rows * step.kernel * narrow * outputs;
  if (step.groups > 1) {
    const int64_t width = grouped_width(step, to);
    int64_t size = 0;
    for (int64_t unit = 0; unit < outputs / width; ++unit) {
      size += direct_depth(step, precision, from, grouped_unit(step, from, to, unit).channels) * width;
    }
    return size;
  }
  if (precision == Precision::int8) {
    return int8_starts(step) * outputs + kBlock + int8_taps(step) * ((from.channels + 3) / 4) * outputs;
  }
  if (step.winograd != 0) return frequencies_of(step) * from.channels * outputs;
  return direct_depth(step, precision, from, from.channels) * outputs;
}

const char* lay_out(Network& network, int64_t height, int64_t width) {
  constexpr const char* kTooLarge = "make maps that are too large for any memory";
  std::vector<Map>& maps = network.maps;
  for (Map& map : maps) {
    map.halo = map.height = 0;
    map.pooled = false;
  }
  maps[0].height = height;
  maps[0].width = width;
  for (const Section& section : network.sections) {
    for (const std::vector<Step>* steps : {&section.entry, &section.body}) {
      for (const Step& step : *steps) {
        Map& from = maps[step.source];
        if (step.kind == Kind::convolution) from.halo = std::max(from.halo, step.padding);
        if (step.kind == Kind::exit || step.kind == Kind::store) continue;
        Map& to = maps[step.target];
        const bool windows = step.kind == Kind::convolution || step.kind == Kind::max_pool;
        const auto out = [&](int64_t size, int64_t window, int64_t padding) {
          if (step.kind == Kind::mean) return int64_t{1};
          return windows ? (size + 2 * padding - window) / step.stride + 1 : size;
        };
        const bool small =
            windows && (from.height + 2 * step.above < step.rows || from.width + 2 * step.padding < step.kernel);
        const int64_t rows = out(from.height, step.rows, step.above);
        const int64_t columns = out(from.width, step.kernel, step.padding);
        // A map that several steps write must get one size from all of them.
        const bool same = to.height == 0 || (to.height == rows && to.width == columns);
        if (from.height < 1 || from.width < 1 || small || !same) return "are too small for the network";
        to.height = rows;
        to.width = columns;
        const bool one_pixel = !windows || (step.kernel == 1 && step.padding == 0);
        to.pooled = step.kind == Kind::mean || (from.pooled && one_pixel);
        // Every padded step may make a map larger.
        if (std::max(to.height, to.width) > kLongestSide) return kTooLarge;
      }
    }
  }
  // A residual is read where the result is written, so both need one layout.
  for (bool changed = true; changed;) {
    changed = false;
    for (const Section& section : network.sections) {
      for (const std::vector<Step>* steps : {&section.entry, &section.body}) {
        for (const Step& step : *steps) {
          if (step.kind != Kind::convolution || step.residual < 0) continue;
          if (maps[step.residual].halo == maps[step.target].halo) continue;
          maps[step.residual].halo = maps[step.target].halo =
              std::max(maps[step.residual].halo, maps[step.target].halo);
          changed = true;
        }
      }
    }
  }
  int64_t total = 0;
  for (Map& map : maps) {
    place_pixels(map, network.precision, &map == maps.data());
    total += map.size * (map.section < 0 ? 1 : network.sections[map.section].group);
    if (total > kMostElements) return kTooLarge;
    if (map.section < 0) continue;
    Section& section = network.sections[map.section];
    map.offset = section.slot_size;
    section.slot_size += round_up(map.size * bytes_of(network.precision), kLine) + 3 * kLine;
  }
  return nullptr;
}

}  // namespace eefast
