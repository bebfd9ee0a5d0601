// Which vector instructions the CPU kernels use; what a file needs that is compiled once for each of them.
#pragma once

#include <cstdint>
#include <string_view>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define EEFAST_X86
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

// The best that the processor has and that EEFAST_ISA and ATEN_CPU_CAPABILITY allow; throws where EEFAST_ISA names
// none.
InstructionSet instruction_set();

}  // namespace eefast::cpu
