// Checks the arguments of eefast::exit_head and hands them to the CUDA kernel as raw pointers.
#include "exit_head_cuda.h"

#include <torch/csrc/stable/ops.h>

#include <string>

#include "checks.h"
#include "cuda/exit_head.h"
#include "current_stream.h"
#include "tensors.h"

namespace eefast {
namespace {

using torch::headeronly::ScalarType;

cpu::DType feature_dtype(const Tensor& features) {
  check_there("features", features);
  switch (features.scalar_type()) {
    case ScalarType::Float: return cpu::DType::float32;
    case ScalarType::Half: return cpu::DType::float16;
    case ScalarType::BFloat16: return cpu::DType::bfloat16;
    default: fail("features is ", toString(features.scalar_type()), "; convert it with .to(torch.float32)");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> exit_head_cuda(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                                  const std::optional<Tensor>& threshold, const Tensor& rows,
                                                  const Tensor& positions, const Tensor& live,
                                                  const std::string& criterion, int64_t exit_index,
                                                  const Tensor& logits, const Tensor& confidence, const Tensor& exits) {
  constexpr int64_t kMaxElements = int64_t{1} << 30, kMaxRows = int64_t{1} << 29;
  cuda::ExitHead head{};
  head.criterion = parse_criterion(criterion);
  head.dtype = feature_dtype(features);
  if (!features.is_cuda()) fail("features is on ", device_name(features), "; move it to a CUDA device");
  if (features.dim() != 4 || sample_elements(features) == 0) {
    fail("features has shape ", shape(features), "; expected [M, C, H, W] with at least one channel and one pixel");
  }
  if (sample_elements(features) >= kMaxElements) {
    fail("features has shape ", shape(features), ", on CUDA a sample has fewer than 2³⁰ elements");
  }
  check_dtype("weight", weight, ScalarType::Float, "float32");
  if (weight.dim() != 2 || weight.size(0) < 2 || weight.size(1) != features.size(1)) {
    fail("weight has shape ", shape(weight), "; expected [K + 1, C] with at least one class and C = ", features.size(1),
         ", the channels of features");
  }
  head.channels = features.size(1);
  head.num_classes = weight.size(0) - 1;
  if (head.num_classes > cuda::ExitHead::kMaxClasses) {
    fail("weight has ", head.num_classes, " classes, on CUDA at most ", cuda::ExitHead::kMaxClasses,
         "; use engine='reference'");
  }
  check_dtype("bias", bias, ScalarType::Float, "float32");
  check_shape("bias", bias, {head.num_classes + 1}, "[K + 1]");
  if (threshold) {
    check_dtype("threshold", *threshold, ScalarType::Float, "float32");
    check_shape("threshold", *threshold, {}, "a scalar");
    check_device("threshold", *threshold, "features", features);
  }
  check_dtype("rows", rows, ScalarType::Int, "int32");
  check_dtype("positions", positions, ScalarType::Int, "int32");
  check_dtype("live", live, ScalarType::Int, "int32");
  if (rows.dim() != 1) fail("rows has shape ", shape(rows), "; expected [R]");
  head.size = rows.size(0);
  if (head.size >= kMaxRows) {
    fail("rows has ", head.size, " entries, on CUDA fewer than 2²⁹ at a time; split the batch");
  }
  check_shape("positions", positions, {head.size}, "[R], as rows");
  check_shape("live", live, {1}, "one number");
  check_dtype("logits", logits, ScalarType::Float, "float32");
  check_dtype("confidence", confidence, ScalarType::Float, "float32");
  check_dtype("exits", exits, ScalarType::Long, "int64");
  if (confidence.dim() != 1) fail("confidence has shape ", shape(confidence), "; expected [N]");
  head.results = confidence.size(0);
  check_shape("logits", logits, {head.results, head.num_classes}, "[N, K]");
  check_shape("exits", exits, {head.results}, "[N]");
  check_device("weight", weight, "features", features);
  check_device("bias", bias, "features", features);
  check_device("rows", rows, "features", features);
  check_device("positions", positions, "features", features);
  check_device("live", live, "features", features);
  check_device("logits", logits, "features", features);
  check_device("confidence", confidence, "features", features);
  check_device("exits", exits, "features", features);
  check_written("logits", logits);
  check_written("confidence", confidence);
  check_written("exits", exits);
  check_apart({{"logits", &logits}, {"confidence", &confidence}, {"exits", &exits}},
              {{"features", &features},
               {"weight", &weight},
               {"bias", &bias},
               {"threshold", threshold ? &*threshold : nullptr},
               {"rows", &rows},
               {"positions", &positions},
               {"live", &live}});

  // Copies live until the launch is queued; memory that is freed then is reused by later work of the same stream only.
  const Tensor weight_values = as_contiguous("weight", weight), bias_values = as_contiguous("bias", bias);
  const Tensor rows_values = as_contiguous("rows", rows), positions_values = as_contiguous("positions", positions);
  const int32_t device = features.get_device_index();
  Tensor next_rows =
             empty("the live list", {head.size}, aoti_torch_dtype_int32(), aoti_torch_device_type_cuda(), device),
         next_positions =
             empty("the live list", {head.size}, aoti_torch_dtype_int32(), aoti_torch_device_type_cuda(), device);
  Tensor next_live = empty("the live list", {1}, aoti_torch_dtype_int32(), aoti_torch_device_type_cuda(), device);
  Tensor workspace = empty("the workspace", {cuda::ExitHead::workspace_words(head.size)}, aoti_torch_dtype_int32(),
                           aoti_torch_device_type_cuda(), device);

  head.features = features.const_data_ptr();
  head.samples = features.size(0);
  head.height = features.size(2);
  head.width = features.size(3);
  head.sample_stride = features.stride(0);
  head.channel_stride = features.stride(1);
  head.row_stride = features.stride(2);
  head.pixel_stride = features.stride(3);
  head.weight = weight_values.const_data_ptr<float>();
  head.bias = bias_values.const_data_ptr<float>();
  head.threshold = threshold ? threshold->const_data_ptr<float>() : nullptr;
  head.exit_index = exit_index;
  head.rows = rows_values.const_data_ptr<int32_t>();
  head.positions = positions_values.const_data_ptr<int32_t>();
  head.live = live.const_data_ptr<int32_t>();
  head.logits = logits.mutable_data_ptr<float>();
  head.logits_row_stride = logits.stride(0);
  head.logits_column_stride = logits.stride(1);
  head.confidence = confidence.mutable_data_ptr<float>();
  head.confidence_stride = confidence.stride(0);
  head.exits = exits.mutable_data_ptr<int64_t>();
  head.exits_stride = exits.stride(0);
  head.next_rows = next_rows.mutable_data_ptr<int32_t>();
  head.next_positions = next_positions.mutable_data_ptr<int32_t>();
  head.next_live = next_live.mutable_data_ptr<int32_t>();
  head.workspace = workspace.mutable_data_ptr<int32_t>();
  if (const char* const error = cuda::launch_exit_head(head, device, current_stream(device))) {
    fail("the CUDA exit head: ", error);
  }
  return {next_rows, next_positions, next_live};
}

}  // namespace eefast
