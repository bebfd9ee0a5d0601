// Registers the CUDA implementations.
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY_FRAGMENT(eefast, m) {
  for (const char* const schema : {eefast::kExitHeadCuda, eefast::kGatherSurvivorsCuda, eefast::kResidentNetwork}) {
    eefast::define(m, schema);
  }
}

STABLE_TORCH_LIBRARY_IMPL(eefast, CUDA, m) {
  m.impl("exit_head_cuda", TORCH_BOX(&eefast::exit_head_cuda));
  m.impl("gather_survivors_cuda", TORCH_BOX(&eefast::gather_survivors_cuda));
  m.impl("resident_forward", TORCH_BOX(&eefast::resident_forward_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(eefast, CompositeExplicitAutograd, m) {
  m.impl("resident_network", TORCH_BOX(&eefast::resident_network));
}
