// Checks the arguments of eefast::exit_head: tensors → the pointers and sizes that its kernels take.
#include "exit_head_arguments.h"

#include <utility>

#include "checks.h"
#include "tensors.h"

namespace eefast {
namespace {

using torch::headeronly::ScalarType;

DType feature_dtype(const Tensor& features, bool on_cuda) {
  check_there("features", features);
  switch (features.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Double:
      if (!on_cuda) return DType::float64;
      [[fallthrough]];
    default: fail("features is ", toString(features.scalar_type()), "; convert it with .to(torch.float32)");
  }
}

// Features and weights fit together, and the kernels can count their elements.
void check_sizes(bool on_cuda, const Tensor& features, const Tensor& weight) {
  constexpr int64_t kMaxElements = int64_t{1} << 48, kMaxElementsOnCuda = int64_t{1} << 30;
  const int64_t elements = map_elements(features);
  if (on_cuda && elements >= kMaxElementsOnCuda) {
    fail("features has shape ", shape(features), ", on CUDA a sample has fewer than 2³⁰ elements");
  }
  if (elements >= kMaxElements) {
    fail("features has shape ", shape(features), "; a sample has fewer than 2⁴⁸ elements");
  }
  check_dtype("weight", weight, ScalarType::Float, "float32");
  if (weight.dim() != 2 || weight.size(0) < 2 || weight.size(1) != features.size(1)) {
    fail("weight has shape ", shape(weight), "; expected [K + 1, C] with at least one class and C = ", features.size(1),
         ", the channels of features");
  }
  if (on_cuda && weight.size(0) - 1 > ExitHeadArguments::kMaxClassesOnCuda) {
    fail("weight has ", weight.size(0) - 1, " classes, on CUDA at most ", ExitHeadArguments::kMaxClassesOnCuda,
         "; use engine='reference'");
  }
  if (weight.numel() >= kMaxElements) fail("weight has shape ", shape(weight), "; expected fewer than 2⁴⁸ elements");
}

void check_live_list(bool on_cuda, const Tensor& rows, const Tensor& positions, const Tensor& live) {
  constexpr int64_t kMaxRowsOnCuda = int64_t{1} << 29;
  check_dtype("rows", rows, ScalarType::Int, "int32");
  check_dtype("positions", positions, ScalarType::Int, "int32");
  check_dtype("live", live, ScalarType::Int, "int32");
  if (rows.dim() != 1) fail("rows has shape ", shape(rows), "; expected [R]");
  if (on_cuda && rows.size(0) >= kMaxRowsOnCuda) {
    fail("rows has ", rows.size(0), " entries, on CUDA fewer than 2²⁹ at a time; split the batch");
  }
  check_shape("positions", positions, {rows.size(0)}, "[R], as rows");
  check_shape("live", live, {1}, "one number");
}

void check_results(const Tensor& logits, const Tensor& confidence, const Tensor& exits, int64_t num_classes) {
  check_dtype("logits", logits, ScalarType::Float, "float32");
  check_dtype("confidence", confidence, ScalarType::Float, "float32");
  check_dtype("exits", exits, ScalarType::Long, "int64");
  if (confidence.dim() != 1) fail("confidence has shape ", shape(confidence), "; expected [N]");
  check_shape("logits", logits, {confidence.size(0), num_classes}, "[N, K]");
  check_shape("exits", exits, {confidence.size(0)}, "[N]");
}

}  // namespace

CheckedExitHead check_exit_head(bool on_cuda, const Tensor& features, const Tensor& weight, const Tensor& bias,
                                const std::optional<Tensor>& threshold, const Tensor& rows, const Tensor& positions,
                                const Tensor& live, const std::string& criterion, int64_t exit_index,
                                const Tensor& logits, const Tensor& confidence, const Tensor& exits,
                                const std::optional<Tensor>& rule) {
  ExitHeadArguments found{};
  found.dtype = feature_dtype(features, on_cuda);
  found.criterion = parse_criterion(criterion);
  if (on_cuda && !features.is_cuda()) fail("features is on ", device_name(features), "; move it to a CUDA device");
  check_sizes(on_cuda, features, weight);
  found.channels = features.size(1);
  found.num_classes = weight.size(0) - 1;
  check_dtype("bias", bias, ScalarType::Float, "float32");
  check_shape("bias", bias, {found.num_classes + 1}, "[K + 1]");
  const Tensor* const limit = threshold ? &*threshold : nullptr;
  if (limit) {
    check_dtype("threshold", *limit, ScalarType::Float, "float32");
    found.threshold_of_each = limit->dim() == 1 && confidence.dim() == 1 && limit->size(0) == confidence.size(0);
    if (found.threshold_of_each) {
      found.threshold_stride = limit->stride(0);
    } else {
      check_shape("threshold", *limit, {}, "a scalar, or [N], one for each place in the results");
    }
  }
  check_live_list(on_cuda, rows, positions, live);
  check_results(logits, confidence, exits, found.num_classes);
  const Tensor* const numbers = rule ? &*rule : nullptr;
  check_rule(criterion, numbers, {kRuleNumbers});
  const Named read = {{"features", &features}, {"weight", &weight},       {"bias", &bias}, {"threshold", limit},
                      {"rows", &rows},         {"positions", &positions}, {"live", &live}, {"rule", numbers}};
  const Named written = {{"logits", &logits}, {"confidence", &confidence}, {"exits", &exits}};
  if (on_cuda) {
    for (const Named& list : {read, written}) {
      for (const auto& [name, tensor] : list) {
        if (tensor) check_device(name, *tensor, "features", features);
      }
    }
  }
  for (const auto& [name, tensor] : written) check_written(name, *tensor);
  check_apart(written, read);

  CheckedExitHead checked{found,
                          as_contiguous("weight", weight),
                          as_contiguous("bias", bias),
                          as_contiguous("rows", rows),
                          as_contiguous("positions", positions),
                          std::nullopt};
  if (numbers) checked.rule = as_contiguous("rule", *numbers);
  ExitHeadArguments& head = checked.arguments;
  head.features = features.const_data_ptr();
  head.samples = features.size(0);
  head.height = features.size(2);
  head.width = features.size(3);
  head.sample_stride = features.stride(0);
  head.channel_stride = features.stride(1);
  head.row_stride = features.stride(2);
  head.pixel_stride = features.stride(3);
  head.weight = checked.weight.const_data_ptr<float>();
  head.bias = checked.bias.const_data_ptr<float>();
  head.threshold = limit ? limit->const_data_ptr<float>() : nullptr;
  head.exit_index = exit_index;
  head.rows = checked.rows.const_data_ptr<int32_t>();
  head.positions = checked.positions.const_data_ptr<int32_t>();
  head.live = live.const_data_ptr<int32_t>();
  head.size = rows.size(0);
  head.logits = logits.mutable_data_ptr<float>();
  head.logits_row_stride = logits.stride(0);
  head.logits_column_stride = logits.stride(1);
  head.confidence = confidence.mutable_data_ptr<float>();
  head.confidence_stride = confidence.stride(0);
  head.exits = exits.mutable_data_ptr<int64_t>();
  head.exits_stride = exits.stride(0);
  head.results = confidence.size(0);
  head.rule = checked.rule ? checked.rule->const_data_ptr<float>() : nullptr;
  return checked;
}

}  // namespace eefast
