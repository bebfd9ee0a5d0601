// Convolution of groups of 2, 4 or 8 channels for one vector width. No include guard: included after direct_lanes.h.
//
// out[y, x, g·n + o] = act(bias[g·n + o] + Σ in[s·y + i, s·x + j, g·n + c] · weight[i, j, c, g·n + o] + residual)
//
// A vector is channels of one pixel, of one or more groups. Input c of every group is spread over the group's lanes and
// multiplied with its weights for all outputs. Sums run over i, j, c in one fixed order.

// Lane l is lane c of the group of l.
template <int64_t n, int64_t c, int64_t... l>
EEFAST_INLINE Floats spread_groups(Floats x, std::integer_sequence<int64_t, l...>) {
  return Floats{x[l / n * n + c]...};
}

// sums + the products of the inputs c … n - 1 of every group with their weights.
template <int64_t n, int64_t c, class E>
EEFAST_INLINE Floats add_inputs(Floats sums, Floats x, const E* group, const Floats* w) {
  if constexpr (c == n) {
    return sums;
  } else {
    // Where all lanes are of one group one load does it.
    if constexpr (n >= kLanes && std::is_same_v<E, float>) {
      sums = splat(group[c]) * w[c] + sums;
    } else {
      constexpr int64_t inside = std::min(n, kLanes);
      static_assert(c < inside || n >= kLanes);
      sums = spread_groups<inside, c % inside>(x, std::make_integer_sequence<int64_t, kLanes>()) * w[c] + sums;
    }
    return add_inputs<n, c + 1>(sums, x, group, w);
  }
}

template <class E, int64_t n, int64_t pixels>
EEFAST_TARGET static void narrow_strip(const Step& step, const Map& from, const E* in, E* out, const E* residual,
                                       const float* weight, Floats bias, int64_t lane) {
  Floats sums[pixels];
  EEFAST_UNROLL
  for (int64_t p = 0; p < pixels; ++p) sums[p] = bias;
  for (int64_t i = 0; i < step.rows; ++i, in += from.row_pitch) {
    for (int64_t j = 0; j < step.kernel; ++j, weight += n * kBlock) {
      Floats w[n];
      EEFAST_UNROLL
      for (int64_t c = 0; c < n; ++c) w[c] = load(weight + c * kBlock);
      const E* x = in + j * kBlock;
      EEFAST_UNROLL
      for (int64_t p = 0; p < pixels; ++p, x += step.stride * kBlock) {
        sums[p] = add_inputs<n, 0>(sums[p], load(x), x - lane % n, w);
      }
    }
  }
  EEFAST_UNROLL
  for (int64_t p = 0; p < pixels; ++p) {
    Floats y = sums[p];
    if (residual != nullptr) y += load(residual + p * kBlock);
    store(out + p * kBlock, step.relu ? relu(y) : y);
  }
}

template <class E, int64_t n, int64_t pixels>
EEFAST_TARGET static void narrow_strips(int64_t count, const Step& step, const Map& from, const E* in, E* out,
                                        const E* residual, const float* weight, Floats bias, int64_t lane) {
  if constexpr (pixels > 1) {
    if (count < pixels) {
      return narrow_strips<E, n, pixels - 1>(count, step, from, in, out, residual, weight, bias, lane);
    }
  }
  narrow_strip<E, n, pixels>(step, from, in, out, residual, weight, bias, lane);
}

template <class E, int64_t n>
EEFAST_TARGET static void narrow_rows(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                      const void* residual, int64_t block, int64_t begin, int64_t end) {
  constexpr int64_t most = kLanes == 16 ? 12 : 6;
  const int64_t strips = (to.width + most - 1) / most, size = step.rows * step.kernel * n * kBlock;
  const int64_t source = block * from.block_pitch, target = block * to.block_pitch;
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t v = 0; v < kBlock; v += kLanes) {
      const float* const weight = step.weight + block * size + v;
      const Floats bias = load(step.bias + block * kBlock + v);
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t x = to.width * s / strips, next = to.width * (s + 1) / strips, place = target + to.at(y, x) + v;
        const int64_t corner = from.at(step.stride * y - step.above, step.stride * x - step.padding);
        narrow_strips<E, n, most>(
            next - x, step, from, static_cast<const E*>(in) + source + corner + v, static_cast<E*>(out) + place,
            residual == nullptr ? nullptr : static_cast<const E*>(residual) + place, weight, bias, v);
      }
    }
    if (step.activation != Activation::none) {
      activate(step.activation, static_cast<E*>(out) + target + to.at(y, 0), to.width * kBlock);
    }
  }
}

template <class E>
EEFAST_TARGET static void narrow(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                 const void* residual, int64_t block, int64_t begin, int64_t end, void*) {
  const int64_t n = narrow_groups(step, from, to);
  const auto rows = n == 2 ? narrow_rows<E, 2> : n == 4 ? narrow_rows<E, 4> : narrow_rows<E, 8>;
  rows(step, from, to, in, out, residual, block, begin, end);
}
