// Direct convolution for one vector width. No include guard: included after activation_lanes.h.
//
// out[y, x, o] = relu(bias[o] + Σ in[s·y + i, s·x + j, c] · weight[i, j, c, o] + residual[y, x, o])
//
// A strip of pixels × a few vectors of output channels stays in registers; a vector of weights is loaded once per strip
// and multiplied with one broadcast input of every pixel. Sums run over c, i, j in one fixed order, so that no split of
// the work changes a bit.

template <class In>
constexpr bool kPairs = std::is_same_v<In, BFloat16>;

#ifdef EEFAST_BFLOAT16
// sums + the products of neighbouring elements.
EEFAST_INLINE Floats add_pairs(Floats sums, const float* weight, const BFloat16* x) {
  int pair;
  std::memcpy(&pair, x, sizeof(pair));
  const __m512i two = _mm512_set1_epi32(pair);
  const __m512i weights = _mm512_loadu_si512(weight);
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)two);
}
#endif

// Vectors per pixel and pixels per strip: as many sums as there are registers for, and some to spare.
constexpr int64_t kBlockVectors = kBlock / kLanes;
#if defined(__aarch64__)
constexpr int64_t kRegisters = 24;
#else
constexpr int64_t kRegisters = kLanes == 16 ? 16 : 12;
#endif

template <class In, class Out, int64_t block, int64_t stride, int64_t vectors, int64_t pixels>
EEFAST_TARGET static void direct_strip(const Step& step, const Map& from, const Map& to, const In* in, Out* out,
                                       const Out* residual, const float* weight, int64_t width, const float* bias) {
  Floats sums[pixels][vectors];
  EEFAST_UNROLL
  for (int64_t v = 0; v < vectors; ++v) {
    const Floats start = load(bias + v * kLanes);
    EEFAST_UNROLL
    for (int64_t p = 0; p < pixels; ++p) sums[p][v] = start;
  }
  constexpr int64_t each = kPairs<In> ? 2 : 1;
  for (int64_t b = 0; b < from.blocks; ++b, in += from.block_pitch) {
    const int64_t channels = std::min(block, from.channels - b * block);
    for (int64_t i = 0; i < step.rows; ++i) {
      for (int64_t j = 0; j < step.kernel; ++j) {
        const In* const x = in + i * from.row_pitch + j * block;
        for (int64_t c = 0; c < channels; c += each, weight += width) {
          if constexpr (kPairs<In>) {
#ifdef EEFAST_BFLOAT16
            EEFAST_UNROLL
            for (int64_t p = 0; p < pixels; ++p) {
              EEFAST_UNROLL
              for (int64_t v = 0; v < vectors; ++v) {
                sums[p][v] = add_pairs(sums[p][v], weight + v * kLanes, x + p * stride * block + c);
              }
            }
#endif
          } else {
            Floats w[vectors];
            EEFAST_UNROLL
            for (int64_t v = 0; v < vectors; ++v) w[v] = load(weight + v * kLanes);
            EEFAST_UNROLL
            for (int64_t p = 0; p < pixels; ++p) {
              const Floats pixel = splat(x[p * stride * block + c]);
              EEFAST_UNROLL
              for (int64_t v = 0; v < vectors; ++v) sums[p][v] = pixel * w[v] + sums[p][v];
            }
          }
        }
      }
    }
  }
  EEFAST_UNROLL
  for (int64_t p = 0; p < pixels; ++p) {
    EEFAST_UNROLL
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t place = v / kBlockVectors * to.block_pitch + p * kBlock + v % kBlockVectors * kLanes;
      Floats y = sums[p][v];
      if (residual != nullptr) y += load(residual + place);
      if (step.relu) y = relu(y);
      store(out + place, y);
    }
  }
}

template <class In, class Out, int64_t block, int64_t stride, int64_t vectors, int64_t pixels>
EEFAST_TARGET static void direct_strips(int64_t n, const Step& step, const Map& from, const Map& to, const In* in,
                                        Out* out, const Out* residual, const float* weight, int64_t width,
                                        const float* bias) {
  if constexpr (pixels > 1) {
    if (n < pixels) {
      return direct_strips<In, Out, block, stride, vectors, pixels - 1>(n, step, from, to, in, out, residual, weight,
                                                                        width, bias);
    }
  }
  direct_strip<In, Out, block, stride, vectors, pixels>(step, from, to, in, out, residual, weight, width, bias);
}

// Rows of the `width` output channels of one group, whose weights are at `weights`.
template <class In, class Out, int64_t block, int64_t stride, int64_t vectors>
EEFAST_TARGET static void direct_rows(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                      const void* residual, const float* weights, int64_t width, int64_t group,
                                      int64_t begin, int64_t end) {
  constexpr int64_t pixels = kRegisters / vectors;
  const int64_t strips = (to.width + pixels - 1) / pixels;
  for (int64_t part = 0; part < width; part += vectors * kLanes) {
    const float* const weight = weights + part;
    const float* const bias = step.bias + group * width + part;
    const int64_t block_start = (group * width + part) / kBlock * to.block_pitch;
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t x = to.width * s / strips, next = to.width * (s + 1) / strips;
        const int64_t place = block_start + to.at(y, x);
        direct_strips<In, Out, block, stride, vectors, pixels>(
            next - x, step, from, to,
            static_cast<const In*>(in) + from.at(stride * y - step.above, stride * x - step.padding),
            static_cast<Out*>(out) + place, residual == nullptr ? nullptr : static_cast<const Out*>(residual) + place,
            weight, width, bias);
      }
      if (step.activation == Activation::none) continue;
      for (int64_t b = 0; b < vectors / kBlockVectors; ++b) {
        activate(step.activation, static_cast<Out*>(out) + block_start + b * to.block_pitch + to.at(y, 0),
                 to.width * kBlock);
      }
    }
  }
}

template <class In, class Out, int64_t block, int64_t stride>
EEFAST_TARGET static void direct_widths(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                        const void* residual, const float* weights, int64_t width, int64_t group,
                                        int64_t begin, int64_t end) {
  if constexpr (kLanes == 16) {
    if (width == 32) {
      return direct_rows<In, Out, block, stride, 2>(step, from, to, in, out, residual, weights, width, group, begin,
                                                    end);
    }
  }
  direct_rows<In, Out, block, stride, kBlockVectors>(step, from, to, in, out, residual, weights, width, group, begin,
                                                     end);
}

template <class E>
EEFAST_TARGET static void direct(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                 const void* residual, int64_t group, int64_t begin, int64_t end, void*) {
  const auto rows = from.block == 1 ? step.stride == 1 ? direct_widths<float, E, 1, 1> : direct_widths<float, E, 1, 2>
                    : step.stride == 1 ? direct_widths<E, E, kBlock, 1>
                                       : direct_widths<E, E, kBlock, 2>;
  const int64_t depth =
      step.rows * step.kernel * (kPairs<E> && from.block != 1 ? (from.channels + 1) / 2 : from.channels);
  const int64_t width = direct_width(to.blocks);
  rows(step, from, to, in, out, residual, step.weight + group * depth * width, width, group, begin, end);
}
