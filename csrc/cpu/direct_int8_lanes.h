// Direct convolution of 8-bit codes for one vector width. No include guard: included after int8_lanes.h.
//
// out[y, x, o] = codes(scale[o] · (start[o] + Σ in[s·y + i, s·x + j, c] · weight[i, j, c, o]) + ratio · residual[y, x,
// o])
//
// As in direct_lanes.h, but four input channels at a time, and in windows three wide four codes are broadcast once
// for the three outputs that read them. Sums are whole numbers, so their order does not matter.

// Where the numbers of a convolution begin, see eefast/ops/resident_int8.py; those of one group of output channels.
struct Int8Weights {
  const int32_t *start, *difference;
  const float *scale, *ratio;
  const uint8_t* weight;
  int64_t width;    // output channels of a row of weights
  int64_t outputs;  // all of them, from one row of starts to the next

  Int8Weights(const Step& step, const Map& to, int64_t group, int64_t bytes_a_group)
      : width(direct_width(to.blocks)), outputs(to.blocks * kBlock) {
    const int64_t starts = int8_starts(step) * outputs;
    start = reinterpret_cast<const int32_t*>(step.bias) + group * width;
    difference = start + outputs;
    scale = step.bias + starts + group * width;
    ratio = step.bias + starts + outputs;
    weight = reinterpret_cast<const uint8_t*>(ratio + kBlock) + group * bytes_a_group;
  }
};

// Output channels that a strip computes: as many vectors of sums, and as many pixels as there are registers for.
template <int64_t vectors>
constexpr int64_t kStrip = longest_strip((kLanes == 16  ? 16
                                          : kLanes == 8 ? 12
                                                        : 8) /
                                         vectors);

// Rounds sums of [pixels][vectors] to codes; adds the residual, where there is one, in the place of the output.
// dense: no other channels lie between the pixels.
template <int64_t vectors, int64_t pixels, bool add, bool dense>
EEFAST_INLINE void store_pixels(const Sums* sums, uint8_t* out, const uint8_t* residual, int64_t to_pitch,
                                const float* scale, float ratio) {
  constexpr int64_t n = pixels * vectors, bytes = vectors * kLanes;
  const int64_t pitch = dense ? bytes : to_pitch;
  static_assert(4 % vectors == 0);
  Floats scales[vectors];
  EEFAST_UNROLL
  for (int64_t v = 0; v < vectors; ++v) scales[v] = load(scale + v * kLanes);
  EEFAST_UNROLL
  for (int64_t i = 0; i < (n + 3) / 4; ++i) {
    Sums whole[4];
    EEFAST_UNROLL
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t at = 4 * i + k < n ? 4 * i + k : n - 1;
      Floats t = product(as_floats(sums[at]), scales[at % vectors]);
      if constexpr (add) {
        t = add_exact_product(load(residual + at / vectors * pitch + at % vectors * kLanes), splat(ratio), t);
      }
      whole[k] = rounded(t);
    }
    uint8_t* const to = out + 4 * i / vectors * pitch;
    const Codes codes = narrow(whole);
    if (4 * i + 4 > n) {
      store_parts<bytes, n % 4 / vectors>(to, pitch, codes);
    } else if constexpr (dense) {
      store_codes<kCodes>(to, codes);
    } else {
      store_parts<bytes, 4 / vectors>(to, pitch, codes);
    }
  }
}

template <int64_t vectors, int64_t pixels>
EEFAST_INLINE void store_pixels(const Sums* sums, uint8_t* out, const uint8_t* residual, int64_t pitch,
                                const float* scale, const float* ratio) {
  const bool dense = pitch == vectors * kLanes;
  if (residual == nullptr) {
    if (dense) return store_pixels<vectors, pixels, false, true>(sums, out, out, pitch, scale, 0.0f);
    store_pixels<vectors, pixels, false, false>(sums, out, out, pitch, scale, 0.0f);
  } else {
    if (dense) return store_pixels<vectors, pixels, true, true>(sums, out, residual, pitch, scale, *ratio);
    store_pixels<vectors, pixels, true, false>(sums, out, residual, pitch, scale, *ratio);
  }
}

// kernel: 3 of windows three wide, or 0 for any.
template <int64_t stride, int64_t kernel, int64_t vectors, int64_t pixels>
EEFAST_TARGET static void int8_strip(const Step& step, const Map& from, const Map& to, const uint8_t* in, uint8_t* out,
                                     const uint8_t* residual, const Int8Weights& numbers, int64_t part) {
  Sums sums[pixels * vectors];
  EEFAST_UNROLL
  for (int64_t v = 0; v < vectors; ++v) {
    const Sums start = load_as<Sums>(numbers.start + part + v * kLanes);
    EEFAST_UNROLL
    for (int64_t p = 0; p < pixels; ++p) sums[p * vectors + v] = start;
  }
  const uint8_t* weight = numbers.weight + 4 * part;
  const int64_t tap = 4 * numbers.width, pitch = from.block, channels = from.channels;
  const int64_t side = kernel == 0 ? step.kernel : kernel;
  for (int64_t i = 0; i < step.rows; ++i, in += from.row_pitch) {
    for (int64_t c = 0; c < channels; c += 4) {
      if constexpr (kernel == 3) {
        Codes w[3][vectors];
        EEFAST_UNROLL
        for (int64_t j = 0; j < 3; ++j) {
          EEFAST_UNROLL
          for (int64_t v = 0; v < vectors; ++v) w[j][v] = load_as<Codes>(weight + j * tap + 4 * v * kLanes);
        }
        const uint8_t* x = in + c;
        EEFAST_UNROLL_ALL
        for (int64_t column = 0; column < (pixels - 1) * stride + 3; ++column, x += pitch) {
          const Codes four = four_codes(x);
          EEFAST_UNROLL
          for (int64_t j = 0; j < 3; ++j) {
            const int64_t p = (column - j) / stride;
            if (column < j || (column - j) % stride != 0 || p >= pixels) continue;
            EEFAST_UNROLL
            for (int64_t v = 0; v < vectors; ++v) {
              sums[p * vectors + v] = add_products(sums[p * vectors + v], four, w[j][v]);
            }
          }
        }
        weight += 3 * tap;
      } else {
        for (int64_t j = 0; j < side; ++j, weight += tap) {
          Codes w[vectors];
          EEFAST_UNROLL
          for (int64_t v = 0; v < vectors; ++v) w[v] = load_as<Codes>(weight + 4 * v * kLanes);
          const uint8_t* x = in + j * pitch + c;
          EEFAST_UNROLL
          for (int64_t p = 0; p < pixels; ++p, x += stride * pitch) {
            const Codes four = four_codes(x);
            EEFAST_UNROLL
            for (int64_t v = 0; v < vectors; ++v) {
              sums[p * vectors + v] = add_products(sums[p * vectors + v], four, w[v]);
            }
          }
        }
      }
    }
  }
  store_pixels<vectors, pixels>(sums, out, residual, to.block, numbers.scale + part, numbers.ratio);
}

template <int64_t stride, int64_t kernel, int64_t vectors, int64_t pixels>
EEFAST_TARGET static void int8_strips(int64_t n, const Step& step, const Map& from, const Map& to, const uint8_t* in,
                                      uint8_t* out, const uint8_t* residual, const Int8Weights& numbers, int64_t part) {
  if constexpr (pixels > 1) {
    if (n < pixels) {
      return int8_strips<stride, kernel, vectors, pixels - 1>(n, step, from, to, in, out, residual, numbers, part);
    }
  }
  int8_strip<stride, kernel, vectors, pixels>(step, from, to, in, out, residual, numbers, part);
}

template <int64_t stride, int64_t kernel, int64_t vectors>
EEFAST_TARGET static void int8_direct(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                      const void* residual, int64_t group, int64_t begin, int64_t end) {
  const int64_t fours = (from.channels + 3) / 4;
  const Int8Weights numbers(step, to, group, step.rows * step.kernel * fours * 4 * direct_width(to.blocks));
  const int64_t strips = (to.width + kStrip<vectors> - 1) / kStrip<vectors>;
  for (int64_t part = 0; part < numbers.width; part += vectors * kLanes) {
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t x = to.width * s / strips, next = to.width * (s + 1) / strips;
        const int64_t place = to.at(y, x) + group * numbers.width + part;
        int8_strips<stride, kernel, vectors, kStrip<vectors>>(
            next - x, step, from, to,
            static_cast<const uint8_t*>(in) + from.at(stride * y - step.above, stride * x - step.padding),
            static_cast<uint8_t*>(out) + place,
            residual == nullptr ? nullptr : static_cast<const uint8_t*>(residual) + place, numbers, part);
      }
    }
  }
}
