// The int8 kernels of the resident engine for one vector width. No include guard: compiled by for_each_isa.h.
#include "cpu/lanes.h"
#include "cpu/criterion_lanes.h"
#include "cpu/direct_lanes.h"
#include "cpu/int8_lanes.h"
#include "cpu/direct_int8_lanes.h"
#include "cpu/winograd_int8_lanes.h"
#include "cpu/winograd_2d_int8_lanes.h"
#include "cpu/convolution_int8_lanes.h"
#include "cpu/pointwise_lanes.h"

EEFAST_TARGET static bool image_row(const float* x, int64_t n, float multiplier, float shift, int64_t channel,
                                    uint8_t* out) {
  return add_image_codes(x, n, multiplier, shift, channel, out);
}
const Kernels kKernels = {int8_convolution, portable::int8_convolution, nullptr,      nullptr, nullptr, 0,
                          affine<uint8_t>,  max_pool<uint8_t>,          exit<uint8_t>};
