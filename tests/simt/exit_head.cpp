// The CUDA exit head on the CPU, with a C interface for tests/ops/test_exit_head_simt.py.
#include "cuda/exit_head.cuh"

namespace eefast::cuda {
namespace {

template <class T, bool CARRIES>
void run(const ExitHead& head, const ExitHeadTiles& tiles) {
  constexpr int kWide = 16 / sizeof(T), kMany = ExitHeadTiles::kManyRows;
  char* const shared = simt::this_block().shared;
  if (tiles.many_classes) {
    if (tiles.wide)
      exit_head_kernel::run<T, kWide, kMany, CARRIES>(head, tiles, shared);
    else
      exit_head_kernel::run<T, 1, kMany, CARRIES>(head, tiles, shared);
  } else {
    if (tiles.wide)
      exit_head_kernel::run<T, kWide, 1, CARRIES>(head, tiles, shared);
    else
      exit_head_kernel::run<T, 1, 1, CARRIES>(head, tiles, shared);
  }
}

template <class T>
void run(const ExitHead& head, const ExitHeadTiles& tiles) {
  if (head.rule)
    run<T, true>(head, tiles);
  else
    run<T, false>(head, tiles);
}

}  // namespace
}  // namespace eefast::cuda

extern "C" long workspace_words(long size) { return eefast::cuda::ExitHead::workspace_words(size); }

extern "C" int struct_bytes() { return sizeof(eefast::cuda::ExitHead); }

// Samples of a tile, warps of a sample, and whether 16 bytes are loaded at once.
extern "C" void tiles(const eefast::cuda::ExitHead* head, int* figures) {
  const auto tiles = eefast::cuda::tiles_of(*head);
  figures[0] = tiles.samples, figures[1] = tiles.warps_per_sample, figures[2] = tiles.wide && tiles.aligned;
}

// delayed: whether other blocks see what a block writes to the workspace only after a fence.
extern "C" const char* exit_head(const eefast::cuda::ExitHead* head, int grid, unsigned order, int dropped,
                                 bool delayed) {
  using namespace eefast;
  const auto tiles = cuda::tiles_of(*head);
  simt::Options options{grid, cuda::ExitHeadTiles::kThreads, tiles.shared_bytes, order, dropped};
  const size_t words = cuda::ExitHead::workspace_words(head->size);
  if (delayed) options.delayed = {{head->workspace, words * sizeof(int32_t)}};
  *head->workspace = 0;
  return simt::launch(options, [&] {
    if (head->dtype == DType::float32)
      cuda::run<float>(*head, tiles);
    else if (head->dtype == DType::float16)
      cuda::run<__half>(*head, tiles);
    else
      cuda::run<__nv_bfloat16>(*head, tiles);
  });
}
