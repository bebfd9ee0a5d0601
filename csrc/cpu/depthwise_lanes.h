// Depthwise convolution for one vector width. No include guard: included after activation_lanes.h.
//
// out[y, x, c] = act(bias[c] + Σ in[s·y + i, s·x + j, c] · weight[i, j, c] + residual[y, x, c])
//
// A vector is channels of one pixel. The sums of a strip of pixels stay in registers; every pixel of a row of the input
// is loaded once for all sums that it is part of. Sums run over i, j in one fixed order.

constexpr int64_t kStrip = kLanes == 16 ? 8 : 6;

template <class E, int64_t kernel, int64_t stride, int64_t pixels>
EEFAST_TARGET static void depthwise_strip(const Step& step, const Map& from, const E* in, E* out, const E* residual,
                                          const float* weight, Floats bias) {
  Floats sums[pixels];
  EEFAST_UNROLL
  for (int64_t p = 0; p < pixels; ++p) sums[p] = bias;
  for (int64_t i = 0; i < kernel; ++i, in += from.row_pitch, weight += kernel * kBlock) {
    Floats w[kernel];
    EEFAST_UNROLL
    for (int64_t j = 0; j < kernel; ++j) w[j] = load(weight + j * kBlock);
    EEFAST_UNROLL_ALL
    for (int64_t q = 0; q < (pixels - 1) * stride + kernel; ++q) {
      const Floats x = load(in + q * kBlock);
      EEFAST_UNROLL
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t j = q - p * stride;
        if (j >= 0 && j < kernel) sums[p] = x * w[j] + sums[p];
      }
    }
  }
  EEFAST_UNROLL
  for (int64_t p = 0; p < pixels; ++p) {
    Floats y = sums[p];
    if (residual != nullptr) y += load(residual + p * kBlock);
    if (step.relu) y = relu(y);
    store(out + p * kBlock, y);
  }
}

template <class E, int64_t kernel, int64_t stride, int64_t pixels>
EEFAST_TARGET static void depthwise_strips(int64_t n, const Step& step, const Map& from, const E* in, E* out,
                                           const E* residual, const float* weight, Floats bias) {
  if constexpr (pixels > 1) {
    if (n < pixels) {
      return depthwise_strips<E, kernel, stride, pixels - 1>(n, step, from, in, out, residual, weight, bias);
    }
  }
  depthwise_strip<E, kernel, stride, pixels>(step, from, in, out, residual, weight, bias);
}

// Any window, pixel by pixel.
template <class E>
EEFAST_TARGET static void depthwise_pixels(int64_t n, const Step& step, const Map& from, const E* in, E* out,
                                           const E* residual, const float* weight, Floats bias) {
  for (int64_t p = 0; p < n; ++p) {
    Floats sum = bias;
    for (int64_t i = 0; i < step.rows; ++i) {
      for (int64_t j = 0; j < step.kernel; ++j) {
        const Floats x = load(in + i * from.row_pitch + (p * step.stride + j) * kBlock);
        sum = x * load(weight + (i * step.kernel + j) * kBlock) + sum;
      }
    }
    if (residual != nullptr) sum += load(residual + p * kBlock);
    store(out + p * kBlock, step.relu ? relu(sum) : sum);
  }
}

template <class E>
EEFAST_TARGET static void depthwise(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                    const void* residual, int64_t block, int64_t begin, int64_t end, void*) {
  const int64_t taps = step.rows * step.kernel;
  const bool square = step.rows == step.kernel;
  decltype(depthwise_pixels<E>)* strips = depthwise_pixels<E>;
  int64_t most = to.width;
  const auto choose = [&](auto* for_one, auto* for_two) {
    strips = step.stride == 1 ? for_one : for_two;
    most = kStrip;
  };
  if (square && step.kernel == 3) choose(depthwise_strips<E, 3, 1, kStrip>, depthwise_strips<E, 3, 2, kStrip>);
  if (square && step.kernel == 5) choose(depthwise_strips<E, 5, 1, kStrip>, depthwise_strips<E, 5, 2, kStrip>);
  if (square && step.kernel == 7) choose(depthwise_strips<E, 7, 1, kStrip>, depthwise_strips<E, 7, 2, kStrip>);
  const int64_t parts = (to.width + most - 1) / most;
  const int64_t source = block * from.block_pitch, target = block * to.block_pitch;
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t v = 0; v < kBlock; v += kLanes) {
      const float* const weight = step.weight + block * taps * kBlock + v;
      const Floats bias = load(step.bias + block * kBlock + v);
      for (int64_t s = 0; s < parts; ++s) {
        const int64_t x = to.width * s / parts, next = to.width * (s + 1) / parts, place = target + to.at(y, x) + v;
        const E* const read = static_cast<const E*>(in) + source +
                              from.at(step.stride * y - step.above, step.stride * x - step.padding) + v;
        strips(next - x, step, from, read, static_cast<E*>(out) + place,
               residual == nullptr ? nullptr : static_cast<const E*>(residual) + place, weight, bias);
      }
    }
    if (step.activation != Activation::none) {
      activate(step.activation, static_cast<E*>(out) + target + to.at(y, 0), to.width * kBlock);
    }
  }
}
