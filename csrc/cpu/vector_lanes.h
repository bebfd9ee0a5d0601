// Convolution of a map of one pixel for one vector width. No include guard: included after activation_lanes.h.

// A 1×1 convolution of a map of one pixel, whose sums would wait for one another: every fourth input has its sum.
EEFAST_TARGET static void direct_vector(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                        const void*, int64_t group, int64_t, int64_t, void*) {
  const int64_t width = direct_width(to.blocks), pitch = from.block_pitch;
  const float* const x = static_cast<const float*>(in) + from.at(0, 0);
  for (int64_t part = 0; part < width; part += kBlock) {
    const float* const weight = step.weight + group * from.channels * width + part;
    Floats sums[4][kBlockVectors] = {};
    EEFAST_UNROLL
    for (int64_t v = 0; v < kBlockVectors; ++v) sums[0][v] = load(step.bias + group * width + part + v * kLanes);
    int64_t c = 0;
    for (; c + 4 <= from.channels; c += 4) {
      const float* const four = x + c / kBlock * pitch + c % kBlock;
      EEFAST_UNROLL
      for (int64_t j = 0; j < 4; ++j) {
        EEFAST_UNROLL
        for (int64_t v = 0; v < kBlockVectors; ++v) {
          sums[j][v] = splat(four[j]) * load(weight + (c + j) * width + v * kLanes) + sums[j][v];
        }
      }
    }
    for (; c < from.channels; ++c) {
      EEFAST_UNROLL
      for (int64_t v = 0; v < kBlockVectors; ++v) {
        sums[0][v] = splat(x[c / kBlock * pitch + c % kBlock]) * load(weight + c * width + v * kLanes) + sums[0][v];
      }
    }
    float* const z = static_cast<float*>(out) + (group * width + part) / kBlock * to.block_pitch + to.at(0, 0);
    EEFAST_UNROLL
    for (int64_t v = 0; v < kBlockVectors; ++v) {
      const Floats y = (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]);
      store(z + v * kLanes, step.relu ? relu(y) : y);
    }
    if (step.activation != Activation::none) activate(step.activation, z, kBlock);
  }
}
