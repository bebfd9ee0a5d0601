// Checks the arguments of eefast::gather_survivors: tensors → the pointers and sizes that its kernels take.
#include "gather_survivors_arguments.h"

#include <array>
#include <cstdint>
#include <string>
#include <utility>

#include "checks.h"
#include "tensors.h"

namespace eefast {
namespace {

constexpr std::array<int, 4> kContiguous = {0, 1, 2, 3}, kChannelsLast = {0, 2, 3, 1};

bool rows_are_dense(const Tensor& tensor, const std::array<int, 4>& order) {
  if (tensor.numel() == 0) return true;
  int64_t stride = 1;
  for (int i = 3; i > 0; --i) {
    const int d = order[i];
    if (tensor.size(d) != 1 && tensor.stride(d) != stride) return false;
    stride *= tensor.size(d);
  }
  return true;
}

int64_t check_gather_shapes(bool on_cuda, const Tensor& features, const Tensor& rows, const Tensor& live,
                            const Tensor& out, const std::optional<Tensor>& offset) {
  constexpr int64_t kMaxElementsOnCuda = int64_t{1} << 31, kMaxRowsOnCuda = int64_t{1} << 29;
  const int64_t elements = map_elements(features);
  if (on_cuda && elements >= kMaxElementsOnCuda) {
    fail("features has shape ", shape(features), ", on CUDA a sample has fewer than 2³¹ elements");
  }
  check_dtype("rows", rows, torch::headeronly::ScalarType::Int, "int32");
  check_dtype("live", live, torch::headeronly::ScalarType::Int, "int32");
  if (rows.dim() != 1) fail("rows has shape ", shape(rows), "; expected [R]");
  const int64_t size = rows.size(0);
  if (on_cuda && size >= kMaxRowsOnCuda) {
    fail("rows has ", size, " entries, on CUDA fewer than 2²⁹ at a time; split the batch");
  }
  check_shape("live", live, {1}, "one number");
  const int64_t places = offset && out.dim() > 0 ? out.size(0) : size;
  check_shape("out", out, {places, features.size(1), features.size(2), features.size(3)}, "[R, C, H, W]");
  if (offset) {
    check_dtype("offset", *offset, torch::headeronly::ScalarType::Int, "int32");
    check_shape("offset", *offset, {1}, "one number");
  }
  return elements;
}

void check_beside_features(const char* name, const Tensor& tensor, const Tensor& features) {
  if (features.is_cuda()) return check_device(name, tensor, "features", features);
  if (const std::string device = device_name(tensor); device != "cpu") {
    fail(name, " is on ", device, "; move it to the CPU, where features is");
  }
}

}  // namespace

CheckedGather check_gather_survivors(bool on_cuda, const Tensor& features, const Tensor& rows, const Tensor& live,
                                     const Tensor& out, const std::optional<Tensor>& offset) {
  check_there("features", features);
  check_there("out", out);
  if (features.is_cuda() != on_cuda) {
    fail("features is on ", device_name(features), "; move it to ", on_cuda ? "a CUDA device" : "the CPU");
  }
  const int64_t elements = check_gather_shapes(on_cuda, features, rows, live, out, offset);
  if (out.scalar_type() != features.scalar_type()) {
    fail("out is ", toString(out.scalar_type()), ", features ", toString(features.scalar_type()),
         "; give both the same dtype");
  }
  if (!(rows_are_dense(features, kContiguous) && rows_are_dense(out, kContiguous)) &&
      !(rows_are_dense(features, kChannelsLast) && rows_are_dense(out, kChannelsLast))) {
    fail("features has strides ", brackets(features.strides()), " and out ", brackets(out.strides()),
         "; make the rows of both contiguous or the rows of both channels-last");
  }
  const Tensor* const given = offset ? &*offset : nullptr;
  for (const auto& [name, tensor] :
       {std::pair{"rows", &rows}, std::pair{"live", &live}, std::pair{"out", &out}, std::pair{"offset", given}}) {
    if (tensor != nullptr) check_beside_features(name, *tensor, features);
  }
  check_written("out", out);
  check_apart({{"out", &out}}, {{"features", &features}, {"rows", &rows}, {"live", &live}, {"offset", given}});

  CheckedGather checked{{}, as_contiguous("rows", rows)};
  const int64_t element = features.element_size();
  GatherArguments& gather = checked.arguments;
  gather.features = features.const_data_ptr();
  gather.samples = features.size(0);
  gather.sample_stride = features.stride(0) * element;
  gather.row_bytes = elements * element;
  gather.rows = checked.rows.const_data_ptr<int32_t>();
  gather.live = live.const_data_ptr<int32_t>();
  gather.size = rows.size(0);
  gather.out = out.mutable_data_ptr();
  gather.out_stride = out.stride(0) * element;
  gather.offset = offset ? offset->const_data_ptr<int32_t>() : nullptr;
  gather.places = out.size(0);
  return checked;
}

}  // namespace eefast
