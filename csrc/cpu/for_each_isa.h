// Compiles the file EEFAST_LANES_FILE once per instruction set, each time in a namespace of that name; with
// EEFAST_LANES_FOR_BFLOAT16 defined for avx512_bf16, too, with EEFAST_LANES_FOR_INT8 for those that multiply bytes. No
// include guard: one inclusion per EEFAST_LANES_FILE.
//
// The file finds EEFAST_LANES, the floats of a vector, EEFAST_TARGET, the attribute that admits the instructions,
// EEFAST_BFLOAT16 where there are bfloat16 products, EEFAST_VNNI where there are those of bytes. With
// EEFAST_SANITIZED defined, there are only the narrowest and the widest set, bytes in short strips (longest_strip): all
// of them would compile for minutes. With EEFAST_WIDEST, for processors that have it, floats have the widest set alone;
// for bytes, the narrowest is that of huge sums. ThreadSanitizer has one of floats, one of bytes.

#if !defined(EEFAST_WIDEST) || defined(EEFAST_LANES_FOR_INT8)
namespace portable {
#define EEFAST_LANES 4
#define EEFAST_TARGET
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace portable
#endif

#ifdef EEFAST_X86
#ifndef EEFAST_SANITIZED
namespace avx2 {
#define EEFAST_LANES 8
#define EEFAST_TARGET __attribute__((target("avx2,fma,f16c")))
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace avx2
#endif

#ifndef EEFAST_LANES_FOR_INT8
namespace avx512 {
#define EEFAST_LANES 16
#define EEFAST_TARGET __attribute__((target("avx512f,fma")))
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_LANES
}  // namespace avx512

#ifdef EEFAST_WIDEST
namespace portable = avx512;
#endif
#endif
#ifdef EEFAST_LANES_FOR_BFLOAT16
#ifdef __SANITIZE_THREAD__
namespace avx512_bf16 = avx512;
#else
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
#ifdef EEFAST_LANES_FOR_INT8
#ifndef EEFAST_SANITIZED
#ifdef EEFAST_AVX_VNNI
namespace avx_vnni {
#define EEFAST_LANES 8
#define EEFAST_VNNI 2
#define EEFAST_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_VNNI
#undef EEFAST_LANES
}  // namespace avx_vnni
#endif

namespace avx512vl_vnni {
#define EEFAST_LANES 8
#define EEFAST_VNNI 1
#define EEFAST_TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")))
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_VNNI
#undef EEFAST_LANES
}  // namespace avx512vl_vnni
#endif

#ifdef __SANITIZE_THREAD__
namespace avx512_vnni = portable;
#else
namespace avx512_vnni {
#define EEFAST_LANES 16
#define EEFAST_VNNI 1
#define EEFAST_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,fma")))
#include EEFAST_LANES_FILE
#undef EEFAST_TARGET
#undef EEFAST_VNNI
#undef EEFAST_LANES
}  // namespace avx512_vnni
#endif
#endif
#endif
