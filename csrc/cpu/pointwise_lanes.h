// Steps other than convolutions for one vector width: affine maps, max pooling, means, products, exits. No include
// guard: included after activation_lanes.h.

// A row of a map, activated as the step says; no map of int8 has another activation than ReLU.
template <class E>
EEFAST_INLINE void finish_row(const Step& step, const Map& to, E* row) {
  if constexpr (!std::is_same_v<E, uint8_t>) {
    if (step.activation != Activation::none) activate(step.activation, row, to.width * kBlock);
  }
}

// out[y, x, c] = scale[c] · in[y, x, c] + shift[c], activated; blocks [begin, end).
template <class E>
EEFAST_TARGET static void affine(const Step& step, const Map& from, const Map& to, const Map&, const void* in,
                                 void* out, const void*, int64_t begin, int64_t end) {
  for (int64_t c = begin * kBlock; c < end * kBlock; c += kLanes) {
    const Floats scale = load(step.weight + c), shift = load(step.bias + c);
    for (int64_t y = 0; y < to.height; ++y) {
      const E* const x = static_cast<const E*>(in) + c / kBlock * from.block_pitch + from.at(y, 0) + c % kBlock;
      E* const z = static_cast<E*>(out) + c / kBlock * to.block_pitch + to.at(y, 0) + c % kBlock;
      for (int64_t k = 0; k < to.width; ++k) {
        const Floats v = load(x + k * from.block) * scale + shift;
        store(z + k * to.block, step.relu ? relu(v) : v);
      }
      if (c % kBlock + kLanes == kBlock) finish_row(step, to, z + kLanes - kBlock);
    }
  }
}

// NaN goes on, as in PyTorch.
EEFAST_INLINE Floats larger(Floats a, Floats b) {
  const Words first = (Words)(a > b) | (Words)(a != a);
  return (Floats)(((Words)a & first) | ((Words)b & ~first));
}

// The largest pixel of every window, of those inside the map.
template <class E>
EEFAST_TARGET static void max_pool(const Step& step, const Map& from, const Map& to, const Map&, const void* in,
                                   void* out, const void*, int64_t begin, int64_t end) {
  const E* const pixels = static_cast<const E*>(in);
  for (int64_t c = begin * kBlock; c < end * kBlock; c += kLanes) {
    for (int64_t y = 0; y < to.height; ++y) {
      const int64_t top = std::max<int64_t>(0, y * step.stride - step.above);
      const int64_t bottom = std::min(from.height, y * step.stride - step.above + step.rows);
      for (int64_t x = 0; x < to.width; ++x) {
        const int64_t left = std::max<int64_t>(0, x * step.stride - step.padding);
        const int64_t right = std::min(from.width, x * step.stride - step.padding + step.kernel);
        Floats most = splat(-std::numeric_limits<float>::infinity());
        for (int64_t i = top; i < bottom; ++i) {
          for (int64_t j = left; j < right; ++j) {
            most = larger(load(pixels + c / kBlock * from.block_pitch + from.at(i, j) + c % kBlock), most);
          }
        }
        store(static_cast<E*>(out) + c / kBlock * to.block_pitch + to.at(y, x) + c % kBlock, most);
      }
    }
  }
}

// Mean over all pixels, channel by channel, of the blocks [begin, end).
template <class E>
EEFAST_INLINE void pool_blocks(const Map& map, const E* in, float* means, int64_t begin, int64_t end) {
  const float area = static_cast<float>(map.height * map.width);
  for (int64_t c = begin * kBlock; c < end * kBlock; c += kLanes) {
    Floats sums[4] = {};
    for (int64_t y = 0; y < map.height; ++y) {
      const E* const row = in + c / kBlock * map.block_pitch + map.at(y, 0) + c % kBlock;
      int64_t x = 0;
      for (; x + 4 <= map.width; x += 4) {
        EEFAST_UNROLL
        for (int64_t k = 0; k < 4; ++k) sums[k] += load(row + (x + k) * map.block);
      }
      for (; x < map.width; ++x) sums[x % 4] += load(row + x * map.block);
    }
    store(means + c, ((sums[0] + sums[1]) + (sums[2] + sums[3])) / area);
  }
}

template <class E>
EEFAST_INLINE void pool(const Map& map, const E* in, float* means) {
  pool_blocks(map, in, means, 0, map.blocks);
}

template <class E>
EEFAST_TARGET static void mean(const Step& step, const Map& from, const Map& to, const Map&, const void* in, void* out,
                               const void*, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    float means[kBlock];
    pool_blocks(from, static_cast<const E*>(in), means - b * kBlock, b, b + 1);
    E* const z = static_cast<E*>(out) + b * to.block_pitch + to.at(0, 0);
    for (int64_t v = 0; v < kBlock; v += kLanes) {
      const Floats y = load(means + v);
      store(z + v, step.relu ? relu(y) : y);
    }
    finish_row(step, to, z);
  }
}

// out[y, x, c] = in[y, x, c] · gates[c], activated; blocks [begin, end).
template <class E>
EEFAST_TARGET static void scale(const Step& step, const Map& from, const Map& to, const Map& gate, const void* in,
                                void* out, const void* gates, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const E* const by = static_cast<const E*>(gates) + b * gate.block_pitch + gate.at(0, 0);
    Floats factors[kBlockVectors];
    EEFAST_UNROLL
    for (int64_t v = 0; v < kBlockVectors; ++v) factors[v] = load(by + v * kLanes);
    for (int64_t y = 0; y < to.height; ++y) {
      const E* const x = static_cast<const E*>(in) + b * from.block_pitch + from.at(y, 0);
      E* const z = static_cast<E*>(out) + b * to.block_pitch + to.at(y, 0);
      for (int64_t k = 0; k < to.width * kBlock; k += kBlock) {
        EEFAST_UNROLL
        for (int64_t v = 0; v < kBlockVectors; ++v) {
          const Floats product = load(x + k + v * kLanes) * factors[v];
          store(z + k + v * kLanes, step.relu ? relu(product) : product);
        }
      }
      finish_row(step, to, z);
    }
  }
}

// The channels of `from` become those of `to` from step.channel on; blocks [begin, end) of `from`.
template <class E>
EEFAST_TARGET static void join(const Step& step, const Map& from, const Map& to, const Map&, const void* in, void* out,
                               const void*, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t channels = std::min(kBlock, from.channels - b * kBlock), channel = step.channel + b * kBlock;
    const int64_t lane = channel % kBlock, here = std::min(channels, kBlock - lane);
    for (int64_t y = 0; y < to.height; ++y) {
      const E* x = static_cast<const E*>(in) + b * from.block_pitch + from.at(y, 0);
      E* z = static_cast<E*>(out) + channel / kBlock * to.block_pitch + to.at(y, 0) + lane;
      if (here == kBlock) {
        std::memcpy(z, x, to.width * kBlock * sizeof(E));
        continue;
      }
      for (int64_t k = 0; k < to.width; ++k, x += kBlock, z += kBlock) {
        std::memcpy(z, x, here * sizeof(E));
        if (here < channels) std::memcpy(z + to.block_pitch - lane, x + here, (channels - here) * sizeof(E));
      }
    }
  }
  const int64_t last = to.channels % kBlock;
  if (last == 0 || end != from.blocks || step.channel + from.channels != to.channels) return;
  // Lanes after the last channel, which kernels may read with weights of zero: another map's NaN may lie there.
  for (int64_t y = 0; y < to.height; ++y) {
    E* z = static_cast<E*>(out) + (to.blocks - 1) * to.block_pitch + to.at(y, 0);
    for (int64_t k = 0; k < to.width; ++k, z += kBlock) std::fill(z + last, z + kBlock, E{0});
  }
}

// All pixels of all channels: [block][y][x][16].
template <class E>
EEFAST_INLINE void flatten(const Map& map, const E* in, float* values) {
  for (int64_t b = 0; b < map.blocks; ++b) {
    for (int64_t y = 0; y < map.height; ++y) {
      const E* const row = in + b * map.block_pitch + map.at(y, 0);
      for (int64_t x = 0; x < map.width; ++x) {
        for (int64_t c = 0; c < kBlock; c += kLanes, values += kLanes) store(values, load(row + x * map.block + c));
      }
    }
  }
}

// What an exit reads of a map: the means of its channels, or all of its pixels.
template <class E>
EEFAST_TARGET static void exit_values(const Step& step, const Map& map, const void* in, float* values) {
  const int64_t pixels = step.flatten ? map.height * map.width : 1, size = map.blocks * kBlock * pixels;
  if (step.flatten) {
    flatten(map, static_cast<const E*>(in), values);
  } else {
    pool(map, static_cast<const E*>(in), values);
  }
  // After the last channel are zeros or, where a pixel was infinite, 0 · ∞, which zero weights would let through.
  const int64_t used = map.channels - (map.blocks - 1) * kBlock;
  for (int64_t i = size - pixels * kBlock; i < size; i += kBlock)
    std::fill(values + i + used, values + i + kBlock, 0.0f);
}

// A vector of logits of `samples` samples, whose values are `pitch` apart; the weights are read once for all of them.
template <int64_t samples>
EEFAST_TARGET static void class_vector(const float* bias, const float* weight, int64_t size, const float* values,
                                       int64_t pitch, float* logits, int64_t logits_pitch) {
  Floats sums[samples][4] = {};
  EEFAST_UNROLL
  for (int64_t n = 0; n < samples; ++n) sums[n][0] = load(bias);
  for (int64_t i = 0; i < size; i += 4) {
    EEFAST_UNROLL
    for (int64_t j = 0; j < 4; ++j) {
      const Floats w = load(weight + (i + j) * kBlock);
      EEFAST_UNROLL
      for (int64_t n = 0; n < samples; ++n) sums[n][j] = splat(values[n * pitch + i + j]) * w + sums[n][j];
    }
  }
  EEFAST_UNROLL
  for (int64_t n = 0; n < samples; ++n) {
    store(logits + n * logits_pitch, (sums[n][0] + sums[n][1]) + (sums[n][2] + sums[n][3]));
  }
}

// Logits of 1 … kExitSamples samples, blocks [begin, end) of 16 of them.
EEFAST_TARGET static void exit_logits(const Step& step, int64_t size, int64_t samples, const float* values,
                                      int64_t pitch, float* logits, int64_t logits_pitch, int64_t begin, int64_t end) {
  for (int64_t k = begin * kBlock; k < end * kBlock; k += kLanes) {
    const float *const bias = step.bias + k, *const weight = step.weight + k / kBlock * size * kBlock + k % kBlock;
    const auto of = samples == 1   ? class_vector<1>
                    : samples == 2 ? class_vector<2>
                    : samples == 3 ? class_vector<3>
                                   : class_vector<4>;
    of(bias, weight, size, values, pitch, logits + k, logits_pitch);
  }
}

// Whether the sample exits, and its confidence.
EEFAST_TARGET static bool exit(const Network& network, const float* threshold, float* logits, float* confidence_out) {
  *confidence_out = confidence(network.criterion, network.num_classes, logits);
  return threshold == nullptr || leaves_at(network.criterion, *confidence_out, *threshold);
}
