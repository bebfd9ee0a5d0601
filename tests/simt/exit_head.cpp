// The CUDA exit head on the CPU, with a C interface for tests/ops/test_exit_head_simt.py.
#include "cuda/exit_head.cuh"

#include <vector>

namespace eefast::cuda {
namespace {

template <class T>
void first(const ExitHead& head, const ExitHeadTiles& tiles) {
  constexpr int kWide = 16 / sizeof(T);
  char* const shared = simt::this_block().shared;
  if (tiles.many_classes) {
    tiles.wide ? exit_head_kernel::pool<T, kWide>(head, tiles, shared)
               : exit_head_kernel::pool<T, 1>(head, tiles, shared);
  } else if (head.rule) {
    tiles.wide ? exit_head_kernel::run<T, kWide, true>(head, tiles, shared)
               : exit_head_kernel::run<T, 1, true>(head, tiles, shared);
  } else {
    tiles.wide ? exit_head_kernel::run<T, kWide, false>(head, tiles, shared)
               : exit_head_kernel::run<T, 1, false>(head, tiles, shared);
  }
}

// Floats that start as NaN, with guards on both sides.
struct Guarded {
  std::vector<float> memory;
  explicit Guarded(int64_t size) : memory(size + 2, NAN) { memory.front() = memory.back() = -99.f; }
  float* data() { return memory.data() + 1; }
  bool whole() const { return memory.front() == -99.f && memory.back() == -99.f; }
};

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
extern "C" const char* exit_head(const eefast::cuda::ExitHead* given, int grid, unsigned order, int dropped_barrier,
                                 bool delayed) {
  using namespace eefast;
  cuda::ExitHead head = *given;
  const auto tiles = cuda::tiles_of(head);
  cuda::Guarded sums(tiles.many_classes ? cuda::sums_of(head, tiles) : 0);
  cuda::Guarded scratch(tiles.many_classes ? head.size * (head.num_classes + 1) : 0);
  head.sums = sums.data(), head.scratch = scratch.data();
  *head.workspace = 0;
  const auto launch = [&](size_t bytes, auto kernel) {
    simt::Options options{grid, cuda::ExitHeadTiles::kThreads, bytes, order, dropped_barrier};
    const size_t words = cuda::ExitHead::workspace_words(head.size);
    if (delayed) options.delayed = {{head.workspace, words * sizeof(int32_t)}};
    const char* const fault = simt::launch(options, [&] { kernel(simt::this_block().shared); });
    return fault || (sums.whole() && scratch.whole()) ? fault : "written beyond sums or logits";
  };
  const char* fault = launch(tiles.many_classes ? tiles.pool_bytes : tiles.shared_bytes, [&](char*) {
    if (head.dtype == DType::float32)
      cuda::first<float>(head, tiles);
    else if (head.dtype == DType::float16)
      cuda::first<__half>(head, tiles);
    else
      cuda::first<__nv_bfloat16>(head, tiles);
  });
  if (fault || !tiles.many_classes) return fault;
  fault = launch(tiles.classify_bytes, [&](char* shared) { cuda::exit_head_kernel::classify(head, tiles, shared); });
  if (fault) return fault;
  return launch(tiles.shared_bytes, [&](char* shared) {
    head.rule ? cuda::exit_head_kernel::decide<true>(head, tiles, shared)
              : cuda::exit_head_kernel::decide<false>(head, tiles, shared);
  });
}
