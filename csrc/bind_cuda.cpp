// Registers the CUDA implementations with the ops that eefast/ops defines.
#include <torch/csrc/stable/library.h>

#include "compact_cuda.h"
#include "exit_head_cuda.h"
#include "resident_forward_cuda.h"

STABLE_TORCH_LIBRARY_IMPL(eefast, CUDA, m) {
  m.impl("exit_head_cuda", TORCH_BOX(&eefast::exit_head_cuda));
  m.impl("compact_cuda", TORCH_BOX(&eefast::compact_cuda));
  m.impl("resident_forward", TORCH_BOX(&eefast::resident_forward_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(eefast, CompositeExplicitAutograd, m) {
  m.impl("resident_network", TORCH_BOX(&eefast::resident_network));
}
