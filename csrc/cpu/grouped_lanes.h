// Grouped convolution for one vector width. No include guard: included after direct_lanes.h.

// One unit of a grouped convolution, as a convolution of its own of the blocks that its groups read.
template <class E>
EEFAST_TARGET static void grouped(const Step& step, const Map& from, const Map& to, const void* in, void* out,
                                  const void* residual, int64_t group, int64_t begin, int64_t end, void*) {
  constexpr Precision precision = kPairs<E> ? Precision::bfloat16 : Precision::float32;
  const int64_t width = grouped_width(step, to);
  const float* weights = step.weight;
  for (int64_t unit = 0; unit < group; ++unit) {
    weights += direct_depth(step, precision, from, grouped_unit(step, from, to, unit).channels) * width;
  }
  const GroupedUnit unit = grouped_unit(step, from, to, group);
  Map read = from;
  read.channels = unit.channels;
  read.blocks = (unit.channels + kBlock - 1) / kBlock;
  const auto rows = step.stride == 1 ? direct_widths<E, E, kBlock, 1> : direct_widths<E, E, kBlock, 2>;
  rows(step, read, to, static_cast<const E*>(in) + unit.begin / kBlock * from.block_pitch, out, residual, weights,
       width, group, begin, end);
}
