// The int8 kernels of the resident engine for one vector width. No include guard: compiled by for_each_isa.h.
#include "cpu/lanes.h"
#include "cpu/criterion_lanes.h"
#include "cpu/activation_lanes.h"
#include "cpu/direct_lanes.h"
#include "cpu/int8_lanes.h"
#include "cpu/direct_int8_lanes.h"
#include "cpu/winograd_int8_lanes.h"
#include "cpu/winograd_2d_int8_lanes.h"
#include "cpu/convolution_int8_lanes.h"
#include "cpu/pointwise_lanes.h"

EEFAST_TARGET static bool image_row(const float* const* rows, int64_t channels, int64_t n, const float* multipliers,
                                    const float* shifts, uint8_t* out) {
  switch (channels) {
    case 1: return store_image_codes<1>(rows, n, multipliers, shifts, out);
    case 2: return store_image_codes<2>(rows, n, multipliers, shifts, out);
    case 3: return store_image_codes<3>(rows, n, multipliers, shifts, out);
    default: return store_image_codes<4>(rows, n, multipliers, shifts, out);
  }
}
const Kernels kKernels = {.rows = int8_convolution,
                          .huge_rows = portable::int8_convolution,
                          .affine = affine<uint8_t>,
                          .max_pool = max_pool<uint8_t>,
                          .exit_values = exit_values<uint8_t>,
                          .exit_logits = exit_logits,
                          .exit = exit,
                          .carry = carry};
