// The kernels of the resident engine for one vector width. No include guard: compiled by for_each_isa.h.
#include "cpu/lanes.h"
#include "cpu/activation_lanes.h"
#include "cpu/criterion_lanes.h"
#include "cpu/direct_lanes.h"
#include "cpu/grouped_lanes.h"
#include "cpu/narrow_lanes.h"
#include "cpu/depthwise_lanes.h"
#include "cpu/points_lanes.h"
#include "cpu/winograd_lanes.h"
#include "cpu/pointwise_lanes.h"

#ifdef EEFAST_BFLOAT16
using Element = BFloat16;
constexpr decltype(Kernels::vector) kVector = nullptr;
#else
#include "cpu/vector_lanes.h"
using Element = float;
constexpr decltype(Kernels::vector) kVector = vector;
#endif
const Kernels kKernels = {.rows = direct<Element>,
                          .huge_rows = nullptr,
                          .grouped = grouped<Element>,
                          .narrow = narrow<Element>,
                          .depthwise = depthwise<Element>,
                          .vector = kVector,
                          .points = points<Element>,
                          .winograd_input = winograd_input,
                          .winograd_multiply = winograd_multiply,
                          .winograd_output = winograd_output,
                          .winograd_line = kWinogradLine,
                          .winograd_in_place = kInPlace,
                          .affine = affine<Element>,
                          .max_pool = max_pool<Element>,
                          .mean = mean<Element>,
                          .scale = scale<Element>,
                          .join = join<Element>,
                          .exit_values = exit_values<Element>,
                          .exit_logits = exit_logits,
                          .exit = exit,
                          .carry = carry};
