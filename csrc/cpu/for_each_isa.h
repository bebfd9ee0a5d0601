// Compiles the file EEFAST_LANES_FILE once per instruction set, each time in a namespace of that name; with
// EEFAST_LANES_FOR_BFLOAT16 defined for avx512_bf16, too. No include guard: one inclusion per EEFAST_LANES_FILE.
//
// The file finds EEFAST_LANES, the floats of a vector, EEFAST_TARGET, the attribute that admits the instructions, and
// EEFAST_BFLOAT16 where there are bfloat16 products.

namespace portable {
#define EEFAST_LANES 4
#define EEFAST_TARGET
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace portable

#ifdef EEFAST_X86
namespace avx2 {
#define EEFAST_LANES 8
#define EEFAST_TARGET __attribute__((target("avx2,fma,f16c")))
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace avx2

namespace avx512 {
#define EEFAST_LANES 16
#define EEFAST_TARGET __attribute__((target("avx512f,fma")))
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace avx512

#ifdef EEFAST_LANES_FOR_BFLOAT16
namespace avx512_bf16 {
#define EEFAST_LANES 16
#define EEFAST_BFLOAT16
#define EEFAST_TARGET __attribute__((target("avx512f,avx512bf16,avx512vl,fma")))
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_BFLOAT16
#undef EEFAST_LANES
}  // namespace avx512_bf16
#endif
#endif
