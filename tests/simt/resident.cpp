// The resident kernel on the CPU, with a C interface for tests/ops/test_resident_simt.py.
#include "cuda/resident.cuh"

namespace eefast::cuda {
namespace {

template <class T>
void run(const Job& job, char* shared) {
  if (job.network.rule)
    resident<T, true>(job, shared);
  else
    resident<T, false>(job, shared);
}

}  // namespace
}  // namespace eefast::cuda

extern "C" const char* resident(const eefast::cuda::Network* network, const eefast::cuda::Batch* batch, int grid,
                                unsigned order, int dropped) {
  using namespace eefast::cuda;
  const simt::Options options{grid, kThreads, shared_bytes(*network), order, dropped};
  *batch->next = 0;
  const Job job{*network, *batch};
  return simt::launch(options, [&] {
    char* const shared = simt::this_block().shared;
    if (network->bfloat16)
      run<__nv_bfloat16>(job, shared);
    else
      run<__half>(job, shared);
  });
}
