// The CUDA gather of survivors' maps on the CPU, with a C interface for tests/ops/test_exit_head_simt.py.
#include "cuda/compact.cuh"

extern "C" int struct_bytes() { return sizeof(eefast::cuda::Compact); }

extern "C" int unit(const eefast::cuda::Compact* compact) { return eefast::cuda::pieces_of(*compact).unit; }

extern "C" const char* compact(const eefast::cuda::Compact* compact, int grid, unsigned order) {
  using namespace eefast::cuda;
  const auto pieces = pieces_of(*compact);
  const simt::Options options{grid, CompactPieces::kThreads, 0, order};
  return simt::launch(options, [&] {
    switch (pieces.unit) {
      case 16: return compact_kernel::run<uint4>(*compact, pieces);
      case 8: return compact_kernel::run<uint2>(*compact, pieces);
      case 4: return compact_kernel::run<uint32_t>(*compact, pieces);
      case 2: return compact_kernel::run<uint16_t>(*compact, pieces);
      default: return compact_kernel::run<uint8_t>(*compact, pieces);
    }
  });
}
