// Registers the C++ implementations with the ops that eefast/ops defines.
#include <torch/csrc/stable/library.h>

#include "exit_head.h"
#include "resident_forward.h"

STABLE_TORCH_LIBRARY_IMPL(eefast, CPU, m) {
  m.impl("exit_head", TORCH_BOX(&eefast::exit_head));
  m.impl("resident_forward", TORCH_BOX(&eefast::resident_forward));
}

STABLE_TORCH_LIBRARY_IMPL(eefast, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&eefast::instruction_set));
}
