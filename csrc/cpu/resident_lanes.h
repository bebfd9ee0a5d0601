// The kernels of the resident engine for one vector width. No include guard: compiled by for_each_isa.h.
#include "cpu/lanes.h"
#include "cpu/criterion_lanes.h"
#include "cpu/direct_lanes.h"
#include "cpu/winograd_lanes.h"
#include "cpu/pointwise_lanes.h"

#ifdef EEFAST_BFLOAT16
using Element = BFloat16;
#else
using Element = float;
#endif
const Kernels kKernels = {direct<Element>, nullptr,         winograd_input,    winograd_multiply, winograd_output,
                          kInPlace,        affine<Element>, max_pool<Element>, exit<Element>};
