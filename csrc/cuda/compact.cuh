// Gather of the survivors' maps into contiguous rows; the device-side count says how many.
//
//   out[offset + i] = features[rows[i]] for i < live;  no other rows of `out` are written
//
// Bytes moved: the survivors' maps, once read and once written, 16 at a time where addresses and sizes allow.
#pragma once

#include "cuda/compact.h"
#include "cuda/simt.h"

namespace eefast::cuda {
namespace compact_kernel {

template <class Unit>
SIMT_DEVICE void run(const Compact& compact, const CompactPieces& pieces) {
  constexpr int kUnroll = CompactPieces::kUnroll;
  const int live = __ldg(compact.live), size = static_cast<int>(compact.size), count = live < size ? live : size;
  const int64_t offset = compact.offset ? __ldg(compact.offset) : 0;
  const int own_row = static_cast<int>(threadIdx.x) / pieces.threads;
  const int own_unit = static_cast<int>(threadIdx.x) & (pieces.threads - 1);
  for (int64_t piece = blockIdx.x; piece < pieces.count; piece += gridDim.x) {
    const int64_t group = pieces.parts == 1 ? piece : piece / pieces.parts;
    const int64_t entry = group * pieces.rows + own_row;
    if (entry >= count) break;
    const int64_t row = __ldg(compact.rows + entry);
    const int64_t place = offset + entry;
    if (row < 0 || row >= compact.samples || place < 0 || place >= compact.places) __trap();
    const Unit* const from =
        reinterpret_cast<const Unit*>(static_cast<const char*>(compact.features) + row * compact.sample_stride);
    Unit* const to = reinterpret_cast<Unit*>(static_cast<char*>(compact.out) + place * compact.out_stride);
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

}  // namespace compact_kernel
}  // namespace eefast::cuda
