// Registers the CPU implementations.
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY_FRAGMENT(eefast, m) {
  for (const char* const schema :
       {eefast::kExitHead, eefast::kGatherSurvivors, eefast::kResidentForward, eefast::kResidentInt8,
        eefast::kResidentLoopOpen, eefast::kResidentLoopPut, eefast::kResidentLoopTake, eefast::kResidentLoopCancel,
        eefast::kResidentLoopClose, eefast::kResidentLoopFree, eefast::kInstructionSet, eefast::kInt8InstructionSet}) {
    eefast::define(m, schema);
  }
}

STABLE_TORCH_LIBRARY_IMPL(eefast, CPU, m) {
  m.impl("exit_head", TORCH_BOX(&eefast::exit_head));
  m.impl("gather_survivors", TORCH_BOX(&eefast::gather_survivors));
  m.impl("resident_forward", TORCH_BOX(&eefast::resident_forward));
  m.impl("resident_int8", TORCH_BOX(&eefast::resident_int8));
}

STABLE_TORCH_LIBRARY_IMPL(eefast, CompositeExplicitAutograd, m) {
  m.impl("resident_loop_open", TORCH_BOX(&eefast::resident_loop_open));
  m.impl("resident_loop_put", TORCH_BOX(&eefast::resident_loop_put));
  m.impl("resident_loop_take", TORCH_BOX(&eefast::resident_loop_take));
  m.impl("resident_loop_cancel", TORCH_BOX(&eefast::resident_loop_cancel));
  m.impl("resident_loop_close", TORCH_BOX(&eefast::resident_loop_close));
  m.impl("resident_loop_free", TORCH_BOX(&eefast::resident_loop_free));
  m.impl("instruction_set", TORCH_BOX(&eefast::instruction_set));
  m.impl("int8_instruction_set", TORCH_BOX(&eefast::int8_instruction_set));
}
