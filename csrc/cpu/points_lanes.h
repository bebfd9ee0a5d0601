// 1×1 convolution of stride 1 for one vector width. No include guard: included after direct_lanes.h.
//
// As direct_lanes.h, with the same sums, but strips go on through the rows of a map and from sample to sample: of small
// maps a row is no whole strip, and each strip reads all weights.

template <class E, int64_t vectors, int64_t pixels>
EEFAST_TARGET static void points_strip(const Step& step, const Map& from, const Map& to, const E* const* in,
                                       E* const* out, const E* const* residual, const float* weight, int64_t width,
                                       const float* bias) {
  Floats sums[pixels][vectors];
  const E* x[pixels];
  EEFAST_UNROLL
  for (int64_t p = 0; p < pixels; ++p) {
    x[p] = in[p];
    EEFAST_UNROLL
    for (int64_t v = 0; v < vectors; ++v) sums[p][v] = load(bias + v * kLanes);
  }
  constexpr int64_t each = kPairs<E> ? 2 : 1;
  int64_t place = 0;
  for (int64_t left = from.channels; left > 0; left -= kBlock, place += from.block_pitch) {
    const int64_t end = place + std::min(kBlock, left);
    for (int64_t c = place; c < end; c += each, weight += width) {
      if constexpr (kPairs<E>) {
#ifdef EEFAST_BFLOAT16
        EEFAST_UNROLL
        for (int64_t p = 0; p < pixels; ++p) {
          EEFAST_UNROLL
          for (int64_t v = 0; v < vectors; ++v) sums[p][v] = add_pairs(sums[p][v], weight + v * kLanes, x[p] + c);
        }
#endif
      } else {
        Floats w[vectors];
        EEFAST_UNROLL
        for (int64_t v = 0; v < vectors; ++v) w[v] = load(weight + v * kLanes);
        EEFAST_UNROLL
        for (int64_t p = 0; p < pixels; ++p) {
          const Floats pixel = splat(x[p][c]);
          EEFAST_UNROLL
          for (int64_t v = 0; v < vectors; ++v) sums[p][v] = pixel * w[v] + sums[p][v];
        }
      }
    }
  }
  EEFAST_UNROLL
  for (int64_t p = 0; p < pixels; ++p) {
    EEFAST_UNROLL
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = v / kBlockVectors * to.block_pitch + v % kBlockVectors * kLanes;
      Floats y = sums[p][v];
      if (residual[p] != nullptr) y += load(residual[p] + at);
      store(out[p] + at, step.relu ? relu(y) : y);
    }
  }
}

template <class E, int64_t vectors, int64_t pixels>
EEFAST_TARGET static void points_strips(int64_t n, const Step& step, const Map& from, const Map& to, const E* const* in,
                                        E* const* out, const E* const* residual, const float* weight, int64_t width,
                                        const float* bias) {
  if constexpr (pixels > 1) {
    if (n < pixels) {
      return points_strips<E, vectors, pixels - 1>(n, step, from, to, in, out, residual, weight, width, bias);
    }
  }
  points_strip<E, vectors, pixels>(step, from, to, in, out, residual, weight, width, bias);
}

template <class E, int64_t vectors>
EEFAST_TARGET static void points_of(const Step& step, const Map& from, const Map& to, const void* const* in,
                                    void* const* out, const void* const* residual, int64_t group, int64_t begin,
                                    int64_t end) {
  // No more than there are registers for their addresses.
  constexpr int64_t most = std::min<int64_t>(8, kRegisters / vectors);
  const int64_t width = direct_width(to.blocks), depth = kPairs<E> ? (from.channels + 1) / 2 : from.channels;
  const int64_t n = end - begin, strips = (n + most - 1) / most, map = to.width * to.height;
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t first = begin + n * s / strips, next = begin + n * (s + 1) / strips;
    const E* from_pixels[most];
    E* to_pixels[most];
    const E* added[most];
    for (int64_t i = first; i < next; ++i) {
      const int64_t sample = i / map, y = i % map / to.width, x = i % to.width;
      const int64_t place = group * width / kBlock * to.block_pitch + to.at(y, x);
      from_pixels[i - first] = static_cast<const E*>(in[sample]) + from.at(y, x);
      to_pixels[i - first] = static_cast<E*>(out[sample]) + place;
      added[i - first] = residual[sample] == nullptr ? nullptr : static_cast<const E*>(residual[sample]) + place;
    }
    for (int64_t part = 0; part < width; part += vectors * kLanes) {
      points_strips<E, vectors, most>(next - first, step, from, to, from_pixels, to_pixels, added,
                                      step.weight + group * depth * width + part, width,
                                      step.bias + group * width + part);
      for (int64_t i = 0; i < next - first; ++i) {
        const int64_t on = vectors / kBlockVectors * to.block_pitch;
        to_pixels[i] += on;
        if (added[i] != nullptr) added[i] += on;
      }
    }
  }
}

// The part of every row that pixels [begin, end) have, of the blocks of a group.
template <class E>
EEFAST_TARGET static void activate_points(const Step& step, const Map& to, void* const* out, int64_t group,
                                          int64_t begin, int64_t end) {
  const int64_t map = to.width * to.height, blocks = direct_width(to.blocks) / kBlock;
  for (int64_t i = begin, next; i < end; i = next) {
    const int64_t x = i % to.width;
    next = std::min(end, i - x + to.width);
    E* const row = static_cast<E*>(out[i / map]) + to.at(i % map / to.width, x);
    for (int64_t b = group * blocks; b < (group + 1) * blocks; ++b) {
      activate(step.activation, row + b * to.block_pitch, (next - i) * kBlock);
    }
  }
}

template <class E>
EEFAST_TARGET static void points(const Step& step, const Map& from, const Map& to, const void* const* in,
                                 void* const* out, const void* const* residual, int64_t group, int64_t begin,
                                 int64_t end) {
  if constexpr (kLanes == 16) {
    if (direct_width(to.blocks) == 32) {
      points_of<E, 2>(step, from, to, in, out, residual, group, begin, end);
    } else {
      points_of<E, 1>(step, from, to, in, out, residual, group, begin, end);
    }
  } else {
    points_of<E, kBlockVectors>(step, from, to, in, out, residual, group, begin, end);
  }
  if (step.activation != Activation::none) activate_points<E>(step, to, out, group, begin, end);
}
