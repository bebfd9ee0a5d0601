// The schemas of the ops that have C++ kernels, the same texts as in eefast/ops: with them, a process that loads only
// this library has the ops.
#pragma once

#include <torch/csrc/stable/library.h>

#include <exception>

namespace eefast {

#define EEFAST_EXIT_HEAD_ARGUMENTS                                                                           \
  "(Tensor features, Tensor weight, Tensor bias, Tensor? threshold, Tensor rows, Tensor positions,"          \
  " Tensor live, str criterion, int exit_index, Tensor(a!) logits, Tensor(b!) confidence, Tensor(c!) exits," \
  " Tensor? rule=None) -> (Tensor, Tensor, Tensor)"

constexpr const char* kExitHead = "exit_head" EEFAST_EXIT_HEAD_ARGUMENTS;
constexpr const char* kExitHeadCuda = "exit_head_cuda" EEFAST_EXIT_HEAD_ARGUMENTS;

#define EEFAST_GATHER_SURVIVORS_ARGUMENTS \
  "(Tensor features, Tensor rows, Tensor live, Tensor(a!) out, Tensor? offset=None) -> ()"

constexpr const char* kGatherSurvivors = "gather_survivors" EEFAST_GATHER_SURVIVORS_ARGUMENTS;
constexpr const char* kGatherSurvivorsCuda = "gather_survivors_cuda" EEFAST_GATHER_SURVIVORS_ARGUMENTS;
constexpr const char* kResidentForward =
    "resident_forward(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor weights, Tensor packed,"
    " Tensor thresholds, str criterion, int num_classes, bool bfloat16=False, int threads=0,"
    " Tensor(a!)? seconds=None, Tensor? normalization=None, Tensor? rule=None, Tensor(b!)? features=None,"
    " Tensor? before=None) -> (Tensor, Tensor, Tensor)";
constexpr const char* kResidentNetwork =
    "resident_network(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor packed, Tensor thresholds,"
    " str criterion, int num_classes, bool bfloat16, Tensor? rule=None) -> (Tensor, int)";
constexpr const char* kResidentInt8 =
    "resident_int8(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor weights, Tensor packed,"
    " Tensor thresholds, Tensor image, str criterion, int num_classes, int threads=0, Tensor(a!)? seconds=None,"
    " Tensor? rule=None, Tensor(b!)? features=None, Tensor? before=None) -> (Tensor, Tensor, Tensor)";
constexpr const char* kResidentLoopOpen =
    "resident_loop_open(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor packed, Tensor thresholds,"
    " str criterion, int num_classes, bool bfloat16, Tensor? image, Tensor? rule, int workers, Tensor(a!) counts)"
    " -> int";
constexpr const char* kResidentLoopPut =
    "resident_loop_put(int loop, Tensor images, Tensor limits, int ticket, float arrived, float deadline) -> ()";
constexpr const char* kResidentLoopTake = "resident_loop_take(int loop, float delay) -> (Tensor, Tensor)";
constexpr const char* kResidentLoopCancel = "resident_loop_cancel(int loop, int ticket) -> ()";
constexpr const char* kResidentLoopClose = "resident_loop_close(int loop, bool drop) -> ()";
constexpr const char* kResidentLoopFree = "resident_loop_free(int loop) -> ()";
constexpr const char* kInstructionSet = "instruction_set() -> str";
constexpr const char* kInt8InstructionSet = "int8_instruction_set() -> str";

// Unless eefast was imported before, without this library: then Python has defined the op.
inline void define(torch::stable::detail::StableLibrary& library, const char* schema) {
  try {
    library.def(schema);
  } catch (const std::exception&) {
  }
}

}  // namespace eefast
