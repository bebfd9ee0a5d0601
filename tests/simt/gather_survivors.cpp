// The CUDA gather of survivors' maps on the CPU, with a C interface for tests/ops/test_exit_head_simt.py.
#include "cuda/gather_survivors.cuh"

extern "C" int struct_bytes() { return sizeof(eefast::cuda::Gather); }

extern "C" int unit(const eefast::cuda::Gather* gather) { return eefast::cuda::pieces_of(*gather).unit; }

extern "C" const char* gather_survivors(const eefast::cuda::Gather* gather, int grid, unsigned order) {
  using namespace eefast::cuda;
  const auto pieces = pieces_of(*gather);
  const simt::Options options{grid, GatherPieces::kThreads, 0, order};
  return simt::launch(options, [&] {
    switch (pieces.unit) {
      case 16: return gather_kernel::run<uint4>(*gather, pieces);
      case 8: return gather_kernel::run<uint2>(*gather, pieces);
      case 4: return gather_kernel::run<uint32_t>(*gather, pieces);
      case 2: return gather_kernel::run<uint16_t>(*gather, pieces);
      default: return gather_kernel::run<uint8_t>(*gather, pieces);
    }
  });
}
