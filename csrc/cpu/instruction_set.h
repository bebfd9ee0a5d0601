// Which vector instructions the CPU kernels use; what a file needs that is compiled once for each of them.
#pragma once

#include <cstdint>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(EEFAST_PORTABLE)
#include <immintrin.h>
#define EEFAST_X86
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define EEFAST_AVX_VNNI
#endif
#endif

// Vectors only travel between inlined functions, so that their calling convention never matters.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC 12 warns of the undefined operand of its AVX-512 intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace eefast::cpu {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Each includes those before it.
enum class InstructionSet { portable, avx2, avx512, avx512_bf16 };
constexpr std::string_view kInstructionSets[] = {"portable", "avx2", "avx512", "avx512_bf16"};

// Those of the int8 kernels; avx_vnni is VNNI in 256 bits, by AVX-VNNI or AVX512-VL.
enum class Int8InstructionSet { portable, avx2, avx_vnni, avx512_vnni };
constexpr std::string_view kInt8InstructionSets[] = {"portable", "avx2", "avx_vnni", "avx512_vnni"};

// The best that the processor has and that EEFAST_ISA and ATEN_CPU_CAPABILITY allow; throws where EEFAST_ISA names
// none.
InstructionSet instruction_set();
Int8InstructionSet int8_instruction_set();
bool has_avx_vnni();

}  // namespace eefast::cpu
