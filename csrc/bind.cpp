// Registers the C++ implementations with the ops that eefast/ops defines.
#include <torch/csrc/stable/library.h>

#include "exit_head.h"

STABLE_TORCH_LIBRARY_IMPL(eefast, CPU, m) { m.impl("exit_head", TORCH_BOX(&eefast::exit_head)); }
