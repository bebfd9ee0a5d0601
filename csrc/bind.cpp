// Registers the CPU implementations.
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY_FRAGMENT(eefast, m) {
  for (const char* const schema : {eefast::kExitHead, eefast::kResidentForward, eefast::kResidentInt8,
                                   eefast::kInstructionSet, eefast::kInt8InstructionSet}) {
    eefast::define(m, schema);
  }
}

STABLE_TORCH_LIBRARY_IMPL(eefast, CPU, m) {
  m.impl("exit_head", TORCH_BOX(&eefast::exit_head));
  m.impl("resident_forward", TORCH_BOX(&eefast::resident_forward));
  m.impl("resident_int8", TORCH_BOX(&eefast::resident_int8));
}

STABLE_TORCH_LIBRARY_IMPL(eefast, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&eefast::instruction_set));
  m.impl("int8_instruction_set", TORCH_BOX(&eefast::int8_instruction_set));
}
