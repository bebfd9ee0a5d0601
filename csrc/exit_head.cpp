// Checks the arguments of eefast::exit_head and hands them to the CPU kernel as raw pointers.
#include "exit_head.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/exit_head.h"
#include "cpu/room.h"
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
    case ScalarType::Double: return cpu::DType::float64;
    default: fail("features is ", toString(features.scalar_type()), "; convert it with .to(torch.float32)");
  }
}

void check_indices(const char* name, const int32_t* values, int64_t live, int64_t size, const char* owner) {
  for (int64_t i = 0; i < live; ++i) {
    if (values[i] < 0 || values[i] >= size) {
      fail(name, "[", i, "] = ", values[i], " is outside of ", owner, ", which has ", size, " rows");
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> exit_head(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                             const std::optional<Tensor>& threshold, const Tensor& rows,
                                             const Tensor& positions, const Tensor& live, const std::string& criterion,
                                             int64_t exit_index, const Tensor& logits, const Tensor& confidence,
                                             const Tensor& exits) {
  constexpr int64_t kMaxElements = int64_t{1} << 48;
  cpu::ExitHead head;
  head.dtype = feature_dtype(features);
  head.criterion = parse_criterion(criterion);
  if (features.dim() != 4 || sample_elements(features) == 0) {
    fail("features has shape ", shape(features), "; expected [M, C, H, W] with at least one channel and one pixel");
  }
  if (sample_elements(features) >= kMaxElements) {
    fail("features has shape ", shape(features), "; a sample has fewer than 2⁴⁸ elements");
  }
  check_dtype("weight", weight, ScalarType::Float, "float32");
  if (weight.dim() != 2 || weight.size(0) < 2 || weight.size(1) != features.size(1)) {
    fail("weight has shape ", shape(weight), "; expected [K + 1, C] with at least one class and C = ", features.size(1),
         ", the channels of features");
  }
  if (weight.numel() >= kMaxElements) fail("weight has shape ", shape(weight), "; expected fewer than 2⁴⁸ elements");
  head.channels = features.size(1);
  head.num_classes = weight.size(0) - 1;
  check_dtype("bias", bias, ScalarType::Float, "float32");
  check_shape("bias", bias, {head.num_classes + 1}, "[K + 1]");
  if (threshold) {
    check_dtype("threshold", *threshold, ScalarType::Float, "float32");
    check_shape("threshold", *threshold, {}, "a scalar");
  }
  check_dtype("rows", rows, ScalarType::Int, "int32");
  check_dtype("positions", positions, ScalarType::Int, "int32");
  check_dtype("live", live, ScalarType::Int, "int32");
  if (rows.dim() != 1) fail("rows has shape ", shape(rows), "; expected [R]");
  const int64_t size = rows.size(0);
  check_shape("positions", positions, {size}, "[R], as rows");
  check_shape("live", live, {1}, "one number");
  check_dtype("logits", logits, ScalarType::Float, "float32");
  check_dtype("confidence", confidence, ScalarType::Float, "float32");
  check_dtype("exits", exits, ScalarType::Long, "int64");
  if (confidence.dim() != 1) fail("confidence has shape ", shape(confidence), "; expected [N]");
  const int64_t results = confidence.size(0);
  check_shape("logits", logits, {results, head.num_classes}, "[N, K]");
  check_shape("exits", exits, {results}, "[N]");
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
  const int64_t live_count = *live.const_data_ptr<int32_t>();
  if (live_count < 0 || live_count > size) fail("live = ", live_count, "; expected 0 … ", size, ", the length of rows");

  // Kept until the kernel is done: they own what the pointers point to.
  const Tensor weight_values = as_contiguous("weight", weight), bias_values = as_contiguous("bias", bias);
  const Tensor rows_values = as_contiguous("rows", rows), positions_values = as_contiguous("positions", positions);
  const auto* const all_rows = rows_values.const_data_ptr<int32_t>();
  const auto* const all_positions = positions_values.const_data_ptr<int32_t>();
  // Copies: what has been checked must not change while it is used, whatever other threads write.
  auto list = cpu::room<int32_t>("the live list", 2 * live_count);
  std::copy_n(all_positions, live_count, std::copy_n(all_rows, live_count, list.begin()));
  head.rows = list.data();
  head.positions = list.data() + live_count;
  check_indices("rows", head.rows, live_count, features.size(0), "features");
  check_indices("positions", head.positions, live_count, results, "logits");

  head.features = features.const_data_ptr();
  head.height = features.size(2);
  head.width = features.size(3);
  // Where there is one of something its stride may be any number.
  const auto stride = [&](int64_t d) { return features.size(d) > 1 ? features.stride(d) : 1; };
  head.sample_stride = stride(0);
  head.channel_stride = stride(1);
  head.row_stride = stride(2);
  head.pixel_stride = stride(3);
  // Lines that follow each other evenly are one long line.
  if (head.width == 1) head.pixel_stride = head.row_stride;
  const bool merged = head.row_stride % head.width == 0 && head.row_stride / head.width == head.pixel_stride;
  if (head.width == 1 || head.height == 1 || merged) {
    head.width *= std::exchange(head.height, 1);
  }
  head.weight = weight_values.const_data_ptr<float>();
  head.bias = bias_values.const_data_ptr<float>();
  head.threshold = threshold ? threshold->const_data_ptr<float>() : nullptr;
  head.exit_index = exit_index;
  head.logits = logits.mutable_data_ptr<float>();
  head.logits_row_stride = logits.stride(0);
  head.logits_column_stride = logits.stride(1);
  head.confidence = confidence.mutable_data_ptr<float>();
  head.confidence_stride = confidence.stride(0);
  head.exits = exits.mutable_data_ptr<int64_t>();
  head.exits_stride = exits.stride(0);
  auto survives = cpu::room<uint8_t>("the live list", live_count);
  head.survives = survives.data();

  const int32_t dtype = aoti_torch_dtype_int32(), cpu = aoti_torch_device_type_cpu();
  Tensor next_rows = empty("the next rows", {size}, dtype, cpu, 0);
  Tensor next_positions = empty("the next positions", {size}, dtype, cpu, 0);
  Tensor next_live = empty("the next live", {1}, dtype, cpu, 0);

  // Below this many elements a second thread costs more than it brings.
  constexpr int64_t kThreadWork = 65536;
  const int64_t work = sample_elements(features) + weight.numel();
  if (live_count > 0) {
    parallel_for(live_count, std::max<int64_t>(1, kThreadWork / work),
                 [&](int64_t begin, int64_t end) { cpu::exit_head(head, begin, end); });
  }
  *next_live.mutable_data_ptr<int32_t>() =
      cpu::partition(all_rows, all_positions, head.survives, live_count, size, next_rows.mutable_data_ptr<int32_t>(),
                     next_positions.mutable_data_ptr<int32_t>());
  return {next_rows, next_positions, next_live};
}

}  // namespace eefast
