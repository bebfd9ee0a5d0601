// The CUDA side of eefast::exit_head: checks the arguments, queues the kernels.
#include <torch/csrc/stable/ops.h>

#include <string>

#include "checks.h"
#include "cuda/exit_head.h"
#include "current_stream.h"
#include "exit_head_arguments.h"
#include "ops.h"
#include "tensors.h"

namespace eefast {

std::tuple<Tensor, Tensor, Tensor> exit_head_cuda(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                                  const std::optional<Tensor>& threshold, const Tensor& rows,
                                                  const Tensor& positions, const Tensor& live,
                                                  const std::string& criterion, int64_t exit_index,
                                                  const Tensor& logits, const Tensor& confidence, const Tensor& exits,
                                                  const std::optional<Tensor>& rule) {
  const CheckedExitHead checked = check_exit_head(true, features, weight, bias, threshold, rows, positions, live,
                                                  criterion, exit_index, logits, confidence, exits, rule);
  cuda::ExitHead head{checked.arguments, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  const int32_t device = features.get_device_index();
  const auto integers = [&](const char* name, int64_t size) {
    return empty(name, {size}, aoti_torch_dtype_int32(), aoti_torch_device_type_cuda(), device);
  };
  Tensor next_rows = integers("the live list", head.size), next_positions = integers("the live list", head.size);
  Tensor next_live = integers("the live list", 1);
  Tensor workspace = integers("the workspace", cuda::ExitHead::workspace_words(head.size));
  head.next_rows = next_rows.mutable_data_ptr<int32_t>();
  head.next_positions = next_positions.mutable_data_ptr<int32_t>();
  head.next_live = next_live.mutable_data_ptr<int32_t>();
  head.workspace = workspace.mutable_data_ptr<int32_t>();
  const cuda::ExitHeadTiles tiles = cuda::tiles_of(head);
  const auto floats = [&](int64_t size) {
    const int64_t there = tiles.many_classes ? size : 0;
    return empty("the workspace", {there}, aoti_torch_dtype_float32(), aoti_torch_device_type_cuda(), device);
  };
  Tensor sums = floats(cuda::sums_of(head, tiles)), scratch = floats(head.size * (head.num_classes + 1));
  head.sums = sums.mutable_data_ptr<float>();
  head.scratch = scratch.mutable_data_ptr<float>();
  if (const char* const error = cuda::launch_exit_head(head, device, current_stream(device))) {
    fail("the CUDA exit head: ", error);
  }
  return {next_rows, next_positions, next_live};
}

}  // namespace eefast
