// Which kernel computes an int8 convolution. No include guard: included after the files of these kernels.

// Output rows [begin, end) of one group of channels; scratch: of kTransformedPlanes planes.
EEFAST_TARGET static void int8_convolution(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                           const void* residual, int64_t group, int64_t begin, int64_t end,
                                           void* scratch) {
  const auto run = [&](auto vectors) {
    constexpr int64_t n = decltype(vectors)::value;
    if (step.winograd == 2) {
      const auto winograd = from.block == 16   ? int8_winograd_2d<16, n>
                            : from.block == 32 ? int8_winograd_2d<32, n>
                            : from.block == 64 ? int8_winograd_2d<64, n>
                                               : int8_winograd_2d<0, n>;
      return winograd(step, from, to, in, out, residual, group, begin, end, scratch);
    }
    if (step.winograd == 1) {
      const auto winograd = from.block == 16   ? int8_winograd<16, n>
                            : from.block == 32 ? int8_winograd<32, n>
                            : from.block == 64 ? int8_winograd<64, n>
                                               : int8_winograd<0, n>;
      return winograd(step, from, to, in, out, residual, group, begin, end, scratch);
    }
    const auto direct = step.kernel == 3   ? step.stride == 1 ? int8_direct<1, 3, n> : int8_direct<2, 3, n>
                        : step.stride == 1 ? int8_direct<1, 0, n>
                                           : int8_direct<2, 0, n>;
    direct(step, from, to, in, out, residual, group, begin, end);
  };
  if constexpr (kLanes == 16) {
    if (direct_width(to.blocks) == 32) return run(std::integral_constant<int64_t, 2>());
  }
  run(std::integral_constant<int64_t, kBlockVectors>());
}
