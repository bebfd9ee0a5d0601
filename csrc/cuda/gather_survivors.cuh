// Gather of the survivors' maps into contiguous rows; the device-side count says how many.
//
//   out[offset + i] = features[rows[i]] for i < live;  no other rows of `out` are written
//
// Bytes moved: the survivors' maps, once read and once written, 16 at a time where addresses and sizes allow.
#pragma once

#include "cuda/gather_survivors.h"
#include "cuda/simt.h"

namespace eefast::cuda {
namespace gather_kernel {

template <class Unit>
SIMT_DEVICE void run(const Gather& gather, const GatherPieces& pieces) {
  constexpr int kUnroll = GatherPieces::kUnroll;
  const int live = __ldg(gather.live), size = static_cast<int>(gather.size), count = live < size ? live : size;
  const int64_t offset = gather.offset ? __ldg(gather.offset) : 0;
  const int own_row = static_cast<int>(threadIdx.x) / pieces.threads;
  const int own_unit = static_cast<int>(threadIdx.x) & (pieces.threads - 1);
  for (int64_t piece = blockIdx.x; piece < pieces.count; piece += gridDim.x) {
    const int64_t group = pieces.parts == 1 ? piece : piece / pieces.parts;
    const int64_t entry = group * pieces.rows + own_row;
    if (entry >= count) break;
    const int64_t row = __ldg(gather.rows + entry);
    const int64_t place = offset + entry;
    if (row < 0 || row >= gather.samples || place < 0 || place >= gather.places) __trap();
    const Unit* const from =
        reinterpret_cast<const Unit*>(static_cast<const char*>(gather.features) + row * gather.sample_stride);
    Unit* const to = reinterpret_cast<Unit*>(static_cast<char*>(gather.out) + place * gather.out_stride);
    const int64_t first = (piece - group * pieces.parts) * pieces.threads * kUnroll + own_unit;
    Unit value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * pieces.threads < pieces.units) value[u] = __ldg(from + first + u * pieces.threads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + u * pieces.threads < pieces.units) to[first + u * pieces.threads] = value[u];
  }
}

}  // namespace gather_kernel
}  // namespace eefast::cuda
