// The kernels of the resident engine for one vector width. No include guard: compiled by for_each_isa.h.
#include "cpu/lanes.h"
#include "cpu/criterion_lanes.h"
#include "cpu/activation_lanes.h"
#include "cpu/direct_lanes.h"
#include "cpu/grouped_lanes.h"
#include "cpu/depthwise_lanes.h"
#include "cpu/vector_lanes.h"
#include "cpu/winograd_lanes.h"
#include "cpu/pointwise_lanes.h"

#ifdef EEFAST_BFLOAT16
using Element = BFloat16;
constexpr decltype(Kernels::rows) kVector = nullptr;
#else
using Element = float;
constexpr decltype(Kernels::rows) kVector = direct_vector;
#endif
const Kernels kKernels = {direct<Element>,   nullptr,           grouped<Element>, depthwise<Element>, kVector,
                          winograd_input,    winograd_multiply, winograd_output,  kInPlace,           affine<Element>,
                          max_pool<Element>, mean<Element>,     scale<Element>,   join<Element>,      exit<Element>};
