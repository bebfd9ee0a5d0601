// The machine that the CUDA kernels are written for: warps with ldmatrix, mma.sync and shuffles.
//
// nvcc maps the functions below to PTX. g++ finds the same names in tests/simt/simt.h, where every thread is a fiber,
// so that the very same kernel sources run, and are tested, on a machine without a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#ifndef __CUDACC__
#include "simt/simt.h"
#else
#define SIMT_DEVICE __device__ __forceinline__
// A separate unit of register allocation: all in one body would spill.
#define SIMT_FUNCTION static __device__ __noinline__

namespace eefast::cuda {

// ldmatrix: four 8×8 matrices of 16-bit numbers; lane l gives the address of one row and gets a fragment of each.
SIMT_DEVICE void load_matrices(uint32_t (&fragment)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address));
}

// mma.sync: C[16×8] += A[16×16]·B[16×8], float32 sums, all spread over the 32 lanes.
SIMT_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SIMT_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace eefast::cuda
#endif
