// The CUDA side of eefast::gather_survivors: checks the arguments, queues the kernel.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "checks.h"
#include "cuda/gather_survivors.h"
#include "current_stream.h"
#include "ops.h"
#include "tensors.h"

namespace eefast {
namespace {

using torch::headeronly::ScalarType;

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

}  // namespace

void gather_survivors_cuda(const Tensor& features, const Tensor& rows, const Tensor& live, const Tensor& out,
                           const std::optional<Tensor>& offset) {
  constexpr int64_t kMaxElements = int64_t{1} << 31, kMaxRows = int64_t{1} << 29;
  check_there("features", features);
  check_there("out", out);
  if (!features.is_cuda()) fail("features is on ", device_name(features), "; move it to a CUDA device");
  const int64_t elements = sample_elements(features);
  if (features.dim() != 4 || elements == 0) {
    fail("features has shape ", shape(features), "; expected [M, C, H, W] with at least one channel and one pixel");
  }
  if (elements >= kMaxElements) {
    fail("features has shape ", shape(features), ", on CUDA a sample has fewer than 2³¹ elements");
  }
  check_dtype("rows", rows, ScalarType::Int, "int32");
  check_dtype("live", live, ScalarType::Int, "int32");
  if (rows.dim() != 1) fail("rows has shape ", shape(rows), "; expected [R]");
  const int64_t size = rows.size(0);
  if (size >= kMaxRows) fail("rows has ", size, " entries, on CUDA fewer than 2²⁹ at a time; split the batch");
  check_shape("live", live, {1}, "one number");
  const int64_t places = offset && out.dim() > 0 ? out.size(0) : size;
  check_shape("out", out, {places, features.size(1), features.size(2), features.size(3)}, "[R, C, H, W]");
  if (offset) {
    check_dtype("offset", *offset, ScalarType::Int, "int32");
    check_shape("offset", *offset, {1}, "one number");
    check_device("offset", *offset, "features", features);
  }
  if (out.scalar_type() != features.scalar_type()) {
    fail("out is ", toString(out.scalar_type()), ", features ", toString(features.scalar_type()),
         "; give both the same dtype");
  }
  if (!(rows_are_dense(features, kContiguous) && rows_are_dense(out, kContiguous)) &&
      !(rows_are_dense(features, kChannelsLast) && rows_are_dense(out, kChannelsLast))) {
    fail("features has strides ", brackets(features.strides()), " and out ", brackets(out.strides()),
         "; make the rows of both contiguous or the rows of both channels-last");
  }
  check_device("rows", rows, "features", features);
  check_device("live", live, "features", features);
  check_device("out", out, "features", features);
  check_written("out", out);
  check_apart({{"out", &out}},
              {{"features", &features}, {"rows", &rows}, {"live", &live}, {"offset", offset ? &*offset : nullptr}});

  // A copy lives until the launch is queued; its memory is reused by later work of the same stream only.
  const Tensor rows_values = as_contiguous("rows", rows);
  const int64_t element = features.element_size();
  cuda::Gather gather{};
  gather.features = features.const_data_ptr();
  gather.samples = features.size(0);
  gather.sample_stride = features.stride(0) * element;
  gather.row_bytes = elements * element;
  gather.rows = rows_values.const_data_ptr<int32_t>();
  gather.live = live.const_data_ptr<int32_t>();
  gather.size = size;
  gather.out = out.mutable_data_ptr();
  gather.out_stride = out.stride(0) * element;
  gather.offset = offset ? offset->const_data_ptr<int32_t>() : nullptr;
  gather.places = places;
  const int32_t device = features.get_device_index();
  if (const char* const error = cuda::launch_gather_survivors(gather, device, current_stream(device))) {
    fail("the CUDA gather of survivors: ", error);
  }
}

}  // namespace eefast
