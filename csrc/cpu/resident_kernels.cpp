// The kernels of the resident engine, compiled once per instruction set.
#include "cpu/resident_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace eefast::cpu {
namespace {

#define EEFAST_KERNELS(E) \
  {direct<E>, winograd_input, winograd_multiply, winograd_output, kInPlace, affine<E>, max_pool<E>, exit<E>}

namespace baseline {
#define EEFAST_LANES 4
#define EEFAST_TARGET
#include "cpu/lanes.h"
#include "cpu/criterion_lanes.h"
#include "cpu/direct_lanes.h"
#include "cpu/winograd_lanes.h"
#include "cpu/pointwise_lanes.h"
const Kernels kKernels = EEFAST_KERNELS(float);
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace baseline

#ifdef EEFAST_X86
namespace avx2 {
#define EEFAST_LANES 8
#define EEFAST_TARGET __attribute__((target("avx2,fma,f16c")))
#include "cpu/lanes.h"
#include "cpu/criterion_lanes.h"
#include "cpu/direct_lanes.h"
#include "cpu/winograd_lanes.h"
#include "cpu/pointwise_lanes.h"
const Kernels kKernels = EEFAST_KERNELS(float);
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace avx2

namespace avx512 {
#define EEFAST_LANES 16
#define EEFAST_TARGET __attribute__((target("avx512f,fma")))
#include "cpu/lanes.h"
#include "cpu/criterion_lanes.h"
#include "cpu/direct_lanes.h"
#include "cpu/winograd_lanes.h"
#include "cpu/pointwise_lanes.h"
const Kernels kKernels = EEFAST_KERNELS(float);
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace avx512

namespace avx512_bf16 {
#define EEFAST_LANES 16
#define EEFAST_BFLOAT16
#define EEFAST_TARGET __attribute__((target("avx512f,avx512bf16,avx512vl,fma")))
#include "cpu/lanes.h"
#include "cpu/criterion_lanes.h"
#include "cpu/direct_lanes.h"
#include "cpu/winograd_lanes.h"
#include "cpu/pointwise_lanes.h"
const Kernels kKernels = EEFAST_KERNELS(BFloat16);
#undef EEFAST_TARGET
#undef EEFAST_BFLOAT16
#undef EEFAST_LANES
}  // namespace avx512_bf16
#endif

}  // namespace

const Kernels& select_kernels(bool bfloat16) {
#ifdef EEFAST_X86
  if (bfloat16) return avx512_bf16::kKernels;
  const InstructionSet best = instruction_set();
  if (best != InstructionSet::portable) return best == InstructionSet::avx2 ? avx2::kKernels : avx512::kKernels;
#endif
  return baseline::kKernels;
}

}  // namespace eefast::cpu
