// 1×1 convolution of maps of one pixel for one vector width. No include guard: included after activation_lanes.h.
//
// out[o] = act(bias[o] + Σ in[c] · weight[c, o])
//
// Every fourth input has its sum, so that few sums do not wait for one another; the weights are read once for a few
// samples.

template <int64_t samples, int64_t vectors>
EEFAST_TARGET static void vector_part(const Step& step, const Map& from, const Map& to, const float* const* in,
                                      float* const* out, const float* weight, const float* bias, int64_t width,
                                      int64_t place) {
  Floats sums[samples][4][vectors] = {};
  const float* x[samples];
  EEFAST_UNROLL
  for (int64_t n = 0; n < samples; ++n) {
    x[n] = in[n] + from.at(0, 0);
    EEFAST_UNROLL
    for (int64_t v = 0; v < vectors; ++v) sums[n][0][v] = load(bias + v * kLanes);
  }
  for (int64_t left = from.channels; left > 0; left -= kBlock) {
    const int64_t channels = std::min(kBlock, left), fours = channels / 4 * 4;
    for (int64_t c = 0; c < fours; c += 4) {
      EEFAST_UNROLL
      for (int64_t j = 0; j < 4; ++j, weight += width) {
        EEFAST_UNROLL
        for (int64_t v = 0; v < vectors; ++v) {
          const Floats w = load(weight + v * kLanes);
          EEFAST_UNROLL
          for (int64_t n = 0; n < samples; ++n) sums[n][j][v] = splat(x[n][c + j]) * w + sums[n][j][v];
        }
      }
    }
    for (int64_t c = fours; c < channels; ++c, weight += width) {
      EEFAST_UNROLL
      for (int64_t v = 0; v < vectors; ++v) {
        const Floats w = load(weight + v * kLanes);
        EEFAST_UNROLL
        for (int64_t n = 0; n < samples; ++n) sums[n][0][v] = splat(x[n][c]) * w + sums[n][0][v];
      }
    }
    EEFAST_UNROLL
    for (int64_t n = 0; n < samples; ++n) x[n] += from.block_pitch;
  }
  EEFAST_UNROLL
  for (int64_t n = 0; n < samples; ++n) {
    EEFAST_UNROLL
    for (int64_t v = 0; v < vectors; ++v) {
      const Floats y = (sums[n][0][v] + sums[n][1][v]) + (sums[n][2][v] + sums[n][3][v]);
      store(out[n] + place + v / kBlockVectors * to.block_pitch + v % kBlockVectors * kLanes, step.relu ? relu(y) : y);
    }
    if (step.activation == Activation::none) continue;
    for (int64_t b = 0; b < vectors / kBlockVectors; ++b) {
      activate(step.activation, out[n] + place + b * to.block_pitch, kBlock);
    }
  }
}

// One group of output channels, with as many vectors at a time as leave registers for the sums.
EEFAST_TARGET static void vector(const Step& step, const Map& from, const Map& to, int64_t samples,
                                 const float* const* in, float* const* out, int64_t group) {
  const int64_t width = direct_width(to.blocks);
  constexpr int64_t most = kLanes == 16 ? 2 : kBlockVectors;
  const int64_t vectors = width % (most * kLanes) == 0 ? most : kBlockVectors;
  const auto part = samples == 1      ? vectors == most ? vector_part<1, most> : vector_part<1, kBlockVectors>
                    : samples == 2    ? vectors == most ? vector_part<2, most> : vector_part<2, kBlockVectors>
                    : vectors == most ? vector_part<3, most>
                                      : vector_part<3, kBlockVectors>;
  for (int64_t o = 0; o < width; o += vectors * kLanes) {
    part(step, from, to, in, out, step.weight + group * from.channels * width + o, step.bias + group * width + o, width,
         (group * width + o) / kBlock * to.block_pitch + to.at(0, 0));
  }
}
